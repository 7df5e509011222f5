"""The loops: prefill, shared-prefix scoring, document streaming, generation. They know no method by name."""

"""lm-eval's requests on their way to the engine and back: choices, documents, questions, batches, what is kept."""

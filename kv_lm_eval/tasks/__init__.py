"""The task YAMLs of kv-lm-eval, found by lm-eval by their folder."""

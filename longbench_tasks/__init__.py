"""LongBench as lm-eval tasks: prompts, truncation in the middle and the metrics of the original code."""

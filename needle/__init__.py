"""Needle-in-a-haystack as lm-eval tasks: haystack builder, scoring and heat map."""

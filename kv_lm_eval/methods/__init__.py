"""WHAT is kept of a KV cache, WHEN it is cut, and what happens to the rest: one published method, one file."""

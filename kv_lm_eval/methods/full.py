from kv_lm_eval.methods.base import Method


class Full(Method):
    """The full KV cache: nothing is evicted. The baseline of every table, through the same code as the methods."""

    compresses = False

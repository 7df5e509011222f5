from kv_lm_eval.methods.base import Method


class NoCache(Method):
    """No KV cache at all (use_cache=False): every token recomputes the whole sequence. A control: the same answers
    as `full`, slower, with kv_bytes 0."""

    compresses = False
    uses_cache = False

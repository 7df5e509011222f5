"""The kind of cache that a compression asks for."""

from __future__ import annotations

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.refresh import RefreshCache
from kv_lm_eval.cache.ring import RingCache
from kv_lm_eval.methods.compression import Compression


def make_cache(compression: Compression, facts: ModelFacts) -> CompressedCache:
    """An empty cache for one batch."""
    if compression.method.ring:
        return RingCache(compression, facts)
    return (RefreshCache if compression.method.reinserted else CompressedCache)(compression, facts)

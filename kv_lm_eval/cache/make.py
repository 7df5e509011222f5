"""The kind of cache that a compression asks for."""

from __future__ import annotations

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.paged import Paged
from kv_lm_eval.cache.refresh import Refresh
from kv_lm_eval.cache.ring import Ring
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.cache.view import AskedOfCompression


def make_cache(
    compression: AskedOfCompression, facts: ModelFacts, prefill_chunk: int | None = None, prefill_evicts: bool = False
) -> CompressedCache:
    """An empty cache for one batch; prompts are fed to it in chunks of `prefill_chunk` tokens, None: in one."""
    method = compression.method
    kind = Ring if method.ring else Refresh if method.reinserted else Paged if method.pages else Segment
    cache = CompressedCache(compression, facts, kind)
    cache.prefill_chunk, cache.prefill_evicts = prefill_chunk, prefill_evicts
    return cache

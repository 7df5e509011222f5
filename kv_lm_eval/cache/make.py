"""The kind of cache that a compression asks for, and the one that reads prompts for several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.fan import Fan
from kv_lm_eval.cache.paged import Paged
from kv_lm_eval.cache.refresh import Refresh
from kv_lm_eval.cache.ring import Ring
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.cache.view import AskedOfCompression


def make_cache(
    compression: AskedOfCompression,
    facts: ModelFacts,
    prefill_chunk: int | None = None,
    prefill_evicts: bool = False,
    of: type[CompressedCache] = CompressedCache,
) -> CompressedCache:
    """An empty cache for one batch; prompts are fed to it in chunks of `prefill_chunk` tokens, None: in one."""
    method = compression.method
    kind = Ring if method.ring else Refresh if method.reinserted else Paged if method.pages else Segment
    cache = of(compression, facts, kind)
    cache.prefill_chunk, cache.prefill_evicts = prefill_chunk, prefill_evicts
    return cache


def make_fan(full: AskedOfCompression, caches: Sequence[CompressedCache], prompts: int) -> CompressedCache:
    """An empty cache for so many prompts, which are read once for all of the caches: `hand_out` gives them theirs.

    Args:
        full: the compression of the full cache. caches: empty, with chunks of one size.
    """
    for cache in caches:
        cache.open(prompts)
    leaves = [cache.segments[0] for cache in caches]
    whole = CompressedCache(full, caches[0].facts, partial(Fan, leaves=leaves))
    whole.prefill_chunk = caches[0].prefill_chunk
    return whole


def hand_out(whole: CompressedCache, caches: Sequence[CompressedCache]) -> None:
    """Gives each cache its own of what a fan has read."""
    for m, cache in enumerate(caches):
        cache.take([fan.leaves[m] for fan in whole.segments if isinstance(fan, Fan)], whole.members)

"""One prefill for several compressions: a prompt is read once and cut for each of them.

A method that cuts after the prompt, or later, does not touch the prompt's own forward, so that a comparison of M
methods need not repeat it (`cache/fan.py`). What follows is each method's own: M times as many rows, which share the
forwards in which they are decoded and meet nowhere else.

Shapes: B prompts, N columns, V vocabulary. Row m * B + b is prompt b under compression m.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.make import hand_out, make_fan
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.engine.prefill import Logits, NewCache, feed, prefill
from kv_lm_eval.methods.compression import compression_of


def may_share(cache: CompressedCache) -> bool:
    """Whether the prompt's own forward is the full cache's and all that a cut needs: nothing is cut and no pair hidden
    before its end, no token is read again after it."""
    method = compression_of(cache).method
    return not method.hides and not method.reads_again and not cache.prefill_evicts and cache.facts.border is None


def prefill_for_all(
    model: PreTrainedModel, new_caches: Sequence[NewCache], rows: Sequence[Sequence[int]]
) -> tuple[list[CompressedCache], Logits]:
    """Prompts with a cut after the last token, for each cache its own: the caches, and the last token's logits [1, V]
    of every prompt that has any.

    Args:
        new_caches: of one model, all of which `may_share`, with chunks of one size.
    """
    if len(new_caches) == 1:
        cache, logits = prefill(model, new_caches[0], rows)
        return [cache], logits
    caches = [new() for new in new_caches]
    assert all(map(may_share, caches))
    whole = make_fan(FULL, caches, len(rows))
    logits = feed(model, whole, rows, keep=1)
    hand_out(whole, caches)
    return caches, logits


def for_each(logits: Logits, prompts: int, caches: int) -> Logits:
    """The prompts' logits, by row of all caches."""
    return {m * prompts + b: own for m in range(caches) for b, own in logits.items()}

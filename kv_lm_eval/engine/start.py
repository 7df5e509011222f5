"""What happens to a batch of prompts before generate() takes over: all of it, by the road that the settings name.

 - in one forward: nothing, generate() does it;
 - in chunks: all chunks but the last, which is generate()'s first forward;
 - with the question after the compression: everything but each row's last token.

Shapes: B rows, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.forward import device_of
from kv_lm_eval.engine.prefill import NewCache, feed_beginning
from kv_lm_eval.engine.question import Tails, as_fed, prefill_before_question


class Started(NamedTuple):
    """A cache and what generate() must be given to go on from it: token ids and mask [B, N], all prompts in whole."""

    cache: CompressedCache
    ids: torch.Tensor
    mask: torch.Tensor


def start(
    model: PreTrainedModel,
    new_cache: NewCache,
    rows: Sequence[Sequence[int]],
    tails: Sequence[int] | Tails | None,
    pad: int,
) -> Started:
    """Feeds what comes before generate()'s own first forward.

    Args:
        rows: prompts, token ids. tails: tokens of each from its question on, None: the whole prompt is compressed.
        pad: token id in the place of padding.
    """
    if tails is not None:
        cache = prefill_before_question(model, new_cache, rows, tails)
        ids, mask = as_fed(rows, tails.tokens if isinstance(tails, Tails) else tails, pad)
    else:
        cache = new_cache()
        feed_beginning(model, cache, rows)
        if cache.facts.border is not None and not cache.batch:  # generate() does all of it
            assert cache.facts.rope is not None
            cache.facts.rope.forget(device_of(model))
        ids, mask = left_padded(rows, pad)
    device = device_of(model)
    return Started(cache, ids.to(device), mask.to(device))


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, N]."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

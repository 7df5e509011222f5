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

from kv_lm_eval.cache.cache import CompressedCache, side_by_side
from kv_lm_eval.engine.forward import device_of
from kv_lm_eval.engine.prefill import Logits, NewCache, feed_beginning
from kv_lm_eval.engine.question import Tails, as_fed, prefill_before_question, prefill_before_question_for_all
from kv_lm_eval.engine.together import for_each, prefill_for_all


class Started(NamedTuple):
    """A cache and what generate() must be given to go on from it: token ids and mask [B, N], all prompts in whole; and
    each row's last logits [1, V] where the prompts have been fed to their end."""

    cache: CompressedCache
    ids: torch.Tensor
    mask: torch.Tensor
    first: Logits | None = None


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


@torch.no_grad()  # not inference_mode: generate() goes on with the cache outside of it
def start_for_all(
    model: PreTrainedModel,
    new_caches: Sequence[NewCache],
    rows: Sequence[Sequence[int]],
    tails: Sequence[int] | Tails | None,
    pad: int,
) -> Started:
    """The same for M compressions, [M * B] rows: prompts that are read once are fed to their end."""
    if len(new_caches) == 1:
        return start(model, new_caches[0], rows, tails, pad)
    first = None
    if tails is not None:
        caches = prefill_before_question_for_all(model, new_caches, rows, tails)
        ids, mask = as_fed(rows, tails.tokens if isinstance(tails, Tails) else tails, pad)
    else:
        caches, logits = prefill_for_all(model, new_caches, rows)
        first = for_each(logits, len(rows), len(caches))
        ids, mask = left_padded(rows, pad)
    device, times = device_of(model), (len(caches), 1)
    return Started(side_by_side(caches), ids.repeat(times).to(device), mask.repeat(times).to(device), first)


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, N]."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

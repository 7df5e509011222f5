"""Query-agnostic compression: the context is prefilled and cut before the question is seen.

Each row is a head, the context, and a tail, everything from its question on. The heads are prefilled and cut. The
tails, but for their last token, are one forward over the compressed cache, in which nothing is cut: a question is read
whole. The schedule's clock starts with the last token, which every row has, so that a row does not depend on the
lengths of its neighbours' questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.prefill import NewCache, forward, prefill


@torch.no_grad()  # not inference_mode: generate() goes on with the cache outside of it
def prefill_before_question(
    model: PreTrainedModel, new_cache: NewCache, rows: Sequence[Sequence[int]], tails: Sequence[int]
) -> CompressedCache:
    """The cache of all tokens but the last of each row, cut after the heads.

    Args:
        rows: prompts, token ids. tails: tokens of each row from its question on, at least 1.
    """
    heads, middles = split(rows, tails)
    cache = prefill(model, new_cache, heads)[0] if any(heads) else new_cache()
    online = cache.compression.schedule.online
    if any(middles):
        cache.set(mode="hold" if online else "decode")
        forward(model, cache, middles, keep=1)
    cache.set(mode="decode", decoded=0)
    return cache


def split(rows: Sequence[Sequence[int]], tails: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Heads, and tails without their last token."""
    starts = [max(0, len(r) - n) for r, n in zip(rows, tails, strict=True)]
    heads = [list(r[:s]) for r, s in zip(rows, starts, strict=True)]
    return heads, [list(r[s:-1]) for r, s in zip(rows, starts, strict=True)]


def as_fed(rows: Sequence[Sequence[int]], tails: Sequence[int], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, N] with the columns of that cache, and one more for each row's last token.

    [padding, head][padding, tail][last token]: what generate() must be given to go on from there.
    """
    heads, middles = split(rows, tails)
    before, between = max(map(len, heads)), max(map(len, middles))
    ids, mask = [], []
    for row, head, middle in zip(rows, heads, middles, strict=True):
        left, inner = before - len(head), between - len(middle)
        ids.append([pad] * left + head + [pad] * inner + middle + [row[-1]])
        mask.append([0] * left + [1] * len(head) + [0] * inner + [1] * (len(middle) + 1))
    return torch.tensor(ids), torch.tensor(mask)

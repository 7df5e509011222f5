"""Feeding token rows of any lengths to the model under one cache.

Shapes: B rows, q tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.check import device_of, takes_logits_to_keep

NewCache = Callable[[], CompressedCache]
HOLD_TOKENS = 4096  # longest stretch of a prompt in one forward when nothing forces a shorter one


def feed(
    model: PreTrainedModel,
    cache: CompressedCache,
    rows: Sequence[Sequence[int]],
    *,
    side: str,
    logits: int,
    starts: Sequence[int] | None = None,
) -> torch.Tensor:
    """One forward of the given tokens: logits of the last `logits` columns, [B, logits, V] (0: all columns).

    Args:
        rows: new tokens of each row; shorter rows are padded.
        side: where the padding goes. "left" before the tokens (prompts), "right" after them (rows that have ended).
        starts: position of each row's first token; default the number of tokens that the row has seen.
    """
    width = max(map(len, rows))
    device = device_of(model)
    starts = starts or cache.next_positions() or [0] * len(rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, part] = torch.tensor(row, dtype=torch.long)
        positions[b, part] = torch.arange(start, start + len(row))
        mask[b, part] = 1
    ragged = any(len(row) < width for row in rows)
    cache.next_counts = [len(row) for row in rows] if ragged else None
    keep = {"logits_to_keep": logits} if takes_logits_to_keep(type(model).forward) else {}
    out = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device) if ragged else None,
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=True,
        **keep,
    ).logits
    return out[:, -logits:] if logits else out


def prefill(
    model: PreTrainedModel, new_cache: NewCache, rows: Sequence[Sequence[int]]
) -> tuple[CompressedCache, torch.Tensor]:
    """Prompts, left-padded, in one forward with one cut after it: the cache and the last token's logits [B, V]."""
    cache = new_cache()
    out = feed(model, cache, rows, side="left", logits=1)
    return cache, out[:, -1]

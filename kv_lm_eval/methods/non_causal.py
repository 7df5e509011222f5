from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kv_lm_eval.cache.transfer import at_least_float32, to_device
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting
from kv_lm_eval.methods.voting import pooled

NEIGHBOURS = 3  # over which scores are averaged


class NonCausal(Method):
    """Attention that a token gets from all tokens of its chunk, earlier ones too, times the norm of its value.

    Every query of the prompt attends over the keys of its chunk of chunk_size tokens, without scaling its logits; what
    a token receives in all, mean over the query heads of a group, is multiplied by the L2 norm of its value and
    averaged over three neighbours. The attention part of Compactor, by itself; no question is needed.

    Paper: arXiv:2507.08143 (Compactor). Reference: NVIDIA/kvpress, presses/non_causal_attention_press.py.
    Deviations: none in the order of the scores (kvpress also centres and scales them over the layer) but for the last
    chunk where it is not full: kvpress fills it with tokens that take part. Later cuts, which the reference has not,
    leave the numbers of older chunks as they were and score the newest with what is left. The queries of the whole
    prompt are held until the cut, of one layer at a time; with prefill_chunk of all layers.
    """

    paper = "arXiv:2507.08143"
    every_query = True

    chunk_size: int = setting(256, "tokens that attend to each other, counted from the first one")

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {**super().example(slots), "chunk_size": 64}

    def validate(self) -> None:
        if self.chunk_size < 1:
            raise UserError(f"chunk_size={self.chunk_size} must be at least 1: a token attends to itself at least")

    @property
    def num_queries(self) -> int:
        return self.chunk_size

    def score(self, view: View) -> Tensor:
        """[B, K, N]: attention received within the chunk times the norm of the value, averaged over neighbours."""
        return pooled(weighted_attention(view, self.chunk_size, (view.pos >= 0)), NEIGHBOURS, "avg")


def weighted_attention(view: View, size: int, counts: Tensor, first: int = 0, last: int = 0) -> Tensor:
    """Attention that each slot receives from the queries of its chunk, times the norm of its value: [B, K, N] float32.

    It is remembered: of chunks whose queries are no longer held it is what it was.

    Args:
        size: tokens of a chunk, counted from token `first`.
        counts: [B, 1 or K, N] slots that take part; 0 for the others. last: newest tokens whose queries do not.
    """
    received, known = _received(view, size, counts, first, last)
    now = (received * at_least_float32(view.values).norm(dim=-1)).masked_fill(~counts, 0.0)
    if view.remembered is not None:
        now = torch.where(known | ~counts, now, view.remembered)
    view.remember(now)
    return now


def _received(view: View, size: int, counts: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """[B, K, N] attention received, mean over the group; [B, 1 or K, N] where all queries of the chunk are held."""
    queries, at = view.queries()  # [B, K, G, q, D], [B, q]
    pos = view.pos
    chunk = torch.where(counts, (pos - first).div(size, rounding_mode="floor"), -1)
    newest = to_device(view.seen, at.device).unsqueeze(1) - last
    of_query = torch.where((at >= first) & (at < newest), (at - first).div(size, rounding_mode="floor"), -2)
    edges = torch.arange(first, max(first, *view.seen) + size, size, device=pos.device)
    slots, asked = (
        torch.searchsorted(x.long().contiguous(), edges.expand(*x.shape[:-1], -1).contiguous()) for x in (pos, at)
    )
    ranges = torch.stack(
        [slots.flatten(0, 1).amin(0), slots.flatten(0, 1).amax(0), asked.amin(0), asked.amax(0)]
    ).tolist()
    known = first + chunk * size >= at[:, :1].unsqueeze(1)
    out = at_least_float32(view.keys.new_zeros(0)).new_zeros(view.keys.shape[:3])
    whole = (min(view.seen) - last - first) // size  # chunks that all rows have to their end
    for c in range(len(edges) - 1):
        low, high, start, end = ranges[0][c], ranges[1][c + 1], ranges[2][c], ranges[3][c + 1]
        if low == high or start == end:
            continue
        own, keys = at_least_float32(queries[:, :, :, start:end]), at_least_float32(view.keys[:, :, low:high])
        logits = own.flatten(2, 3) @ keys.transpose(2, 3)  # [B, K, G * q, slots]
        alike = all(least[i] == most[i] for least, most in (ranges[:2], ranges[2:]) for i in (c, c + 1))
        if alike and c < whole:  # all rows and heads have the chunk in the same place, to its end
            out[:, :, low:high] += logits.softmax(-1).sum(2)
            continue
        there = (chunk[:, :, low:high] == c).unsqueeze(2)
        asks = (of_query[:, start:end] == c).view(len(at), 1, 1, -1, 1)
        weights = logits.masked_fill(~(there | ~there.any(-1, keepdim=True)), float("-inf")).softmax(-1) * there
        out[:, :, low:high] += (weights.unflatten(2, (own.shape[2], -1)) * asks).sum((2, 3))
    return out / queries.shape[2], known

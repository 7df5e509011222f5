"""Queries that choose what they read: all pairs are held, and of a layer each query head reads its best pages.

A page is so many tokens in a row. What its keys could give a query at most is known from the largest and the smallest
number that they have in each dimension; the pages with the largest bounds are read, the others are left out of the
softmax. What a kernel would load for a token is counted: the pairs of the chosen pages, once for all query heads of a
group, and two vectors a page for the bounds. Here all keys are in memory and masked, so that nothing becomes faster.

Shapes: B rows, H query heads, K KV heads, G = H / K, n visible slots, P pages, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kv_lm_eval.cache.attention import Step, Visible, masked_weights, packed_queries, visible
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.cache.transfer import at_least_float32
from kv_lm_eval.cache.view import AskedOfCompression, Pages


class Paged(Segment):
    """Rows whose queries read pages once the prompt, which is read whole, is over.

    Attributes:
        read: bytes that the last token fed has read, by row.
    """

    may_join = False  # slots of a row stand where its tokens stood
    serves = ("pages",)

    def __init__(self, compression: AskedOfCompression, facts: ModelFacts) -> None:
        self._reads: list[list[float]] = []
        super().__init__(compression, facts)

    def open(self, rows: int, *args: Any, **words: Any) -> None:
        super().open(rows, *args, **words)
        self.read: list[float] = [0.0] * rows

    def _counts_of(self, rows: Sequence[int]) -> Segment:
        new = super()._counts_of(rows)
        assert isinstance(new, Paged)
        new.read = [self.read[i] for i in rows]
        new._reads = [[step[i] for i in rows] for step in self._reads]
        return new

    def begin(self, pos: torch.Tensor) -> None:
        """As in `Segment`: places [B, q]."""
        super().begin(pos)
        if not self.reads_only:
            self.read = [0.0] * self.rows

    def note(self) -> None:
        super().note()
        self._reads.append(list(self.read))

    def _chooses(self, layer: int) -> bool:
        """Whether the running forward reads pages of the layer, and not all of it."""
        pages = self.compression.method.pages
        assert pages is not None
        return self.mode in ("decode", "score") and layer >= pages.dense_layers and self.facts.compressible(layer)

    def _after_attention(self, step: Step) -> None:
        if not self._chooses(step.layer) and not self.reads_only:
            store = self.stores[step.layer]
            heads, size = store.keys.shape[1], store.bytes_per_slot
            self._count([held * heads * size for held in self.held[step.layer]])
        super()._after_attention(step)

    def _attention(self, step: Step, seen: Visible) -> torch.Tensor:
        if not self._chooses(step.layer):
            return super()._attention(step, seen)
        pages = self.compression.method.pages
        assert pages is not None
        heads, size = seen.keys.shape[1], self.stores[step.layer].bytes_per_slot
        outs = []
        for at in range(step.tokens):
            out, pairs, bounds = self._one(step, seen, at, pages)
            outs.append(out)
        if not self.reads_only:
            ends = 2 * seen.keys.shape[3] * seen.keys.element_size()
            self._count([n * size + heads * bounds * ends for n in pairs])
        return torch.cat(outs, dim=2)

    def _one(self, step: Step, seen: Visible, at: int, pages: Pages) -> tuple[torch.Tensor, list[int], int]:
        """Attention of one of the new tokens, [B, H, 1, D]; pairs that each row has read in all heads, and bounds."""
        shown = visible(step, seen, at, at + 1)[:, 0, 0]
        alike = seen.branch is None  # then rows see slots of the same places
        outs, pairs, most = [], list[int](), 0
        for row in range(1 if alike else self.rows):
            rows = slice(None) if alike else slice(row, row + 1)
            slots = shown[row].nonzero().squeeze(1)
            keys, values = seen.keys[rows][:, :, slots], seen.values[rows][:, :, slots]
            first = int(seen.pos[row, 0, slots[0]])
            query = packed_queries(step.query[rows, :, at : at + 1], keys.shape[1])
            mask, count = best_pages(query, keys, first, pages)
            weights = masked_weights(query, keys, mask, step, None)
            outs.append((weights.to(values.dtype) @ values).flatten(1, 2).unsqueeze(2))
            pairs += mask.any(2).sum((1, 2)).tolist()
            most = max(most, count if count > pages.most else 0)  # all are read: nobody asks for bounds
        return torch.cat(outs), pairs, most

    def _count(self, read: Sequence[float]) -> None:
        """Adds what the last token has read of a layer."""
        self.read = [a + b * self.facts.ranks for a, b in zip(self.read, read, strict=True)]

    def snapshot(self, decode_steps: Sequence[int] | None = None) -> dict[str, Any]:
        found = super().snapshot(decode_steps)
        read = self.read
        if decode_steps is not None and self._reads:
            read = [self._reads[min(n, len(self._reads) - 1)][b] for b, n in enumerate(decode_steps)]
        held = found["kv_bytes_valid"]
        found["kv_bytes_read"] = list(read)
        found["compressed"] = [c or 0 < r < h for c, r, h in zip(found["compressed"], read, held, strict=True)]
        return found


def best_pages(query: torch.Tensor, keys: torch.Tensor, first: int, pages: Pages) -> tuple[torch.Tensor, int]:
    """Which slots each query head reads, [B, K, G, n] bool, and how many pages there are to choose from.

    Args:
        query: [B, K, G, D]. keys: [B, K, n, D] of tokens in a row, the oldest at position `first`.
    """
    b, k, n, d = keys.shape
    before = first % pages.size
    count = -(-(before + n) // pages.size)
    around = (0, 0, before, count * pages.size - before - n)
    wide = at_least_float32(keys)
    largest = F.pad(wide, around, value=float("-inf")).view(b, k, count, pages.size, d).amax(3)
    smallest = F.pad(wide, around, value=float("inf")).view(b, k, count, pages.size, d).amin(3)
    towards = at_least_float32(query)
    bounds = towards.clamp_min(0) @ largest.transpose(2, 3) + towards.clamp_max(0) @ smallest.transpose(2, 3)
    order = bounds.argsort(dim=-1, descending=True, stable=True)[..., : pages.most]
    chosen = torch.zeros_like(bounds, dtype=torch.bool).scatter_(3, order, True)
    return chosen.repeat_interleave(pages.size, dim=3)[..., before : before + n], count

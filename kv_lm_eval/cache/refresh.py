"""A negative control: tokens that a cut drops are put back at the end of the cache, as if they were the newest.

At each cut `reinserted` of the dropped tokens, evenly spaced, are rotated to the places after the newest one, and the
text goes on behind them. So everything that comes later stands that much further: a layer whose last slot is at
position p goes on at p + 1, whatever number transformers gives the token, and queries and keys are turned by the
difference. The pairs are consistent, and still the control is harmful: the neighbourhood that local heads read is no
longer the text's, and the next cut takes the stale pairs for recent ones.

Reference: hopecommon/CS3602@b3ebb26 (refresh_budget, refresh_policy=uniform). Deviations: the budget is counted once.

Shapes: B batch rows, K KV heads, M slots kept, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kv_lm_eval.cache.attention import Step
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.segment import MAX_ROOM, Segment
from kv_lm_eval.cache.store import Kept, rows_of
from kv_lm_eval.cache.transfer import to_device
from kv_lm_eval.cache.view import AskedOfCompression


class Refresh(Segment):
    """A segment for a method with sinks and a window that reinserts some of what it evicts."""

    may_join = False
    serves = ("reinserted",)

    def __init__(self, compression: AskedOfCompression, facts: ModelFacts) -> None:
        super().__init__(compression, facts)
        self._shifts: dict[int, list[int]] = {}  # by layer, how far ahead of itself a row goes on

    def attend(self, step: Step) -> torch.Tensor:
        """[B, H, q, D]"""
        shift, rope = self._shifts.get(step.layer), self.facts.rope
        if shift is not None and any(shift):
            assert rope is not None
            delta = to_device(shift, step.query.device).view(-1, 1)
            query, key = step.query, step.key
            if self.facts.rotates(step.layer):
                query, key = (rope.rotate(x, delta, step.layer) for x in (query, key))
            step = step._replace(query=query, key=key, pos=step.pos + delta.to(step.pos.device))
        return super().attend(step)

    def _counts_of(self, rows: Sequence[int]) -> Segment:
        new = super()._counts_of(rows)
        assert isinstance(new, Refresh)
        new._shifts = {layer: [shift[i] for i in rows] for layer, shift in self._shifts.items()}
        return new

    def _lost(self, layer: int) -> list[float]:
        return [lost + s for lost, s in zip(super()._lost(layer), self._shifts[layer], strict=True)]

    def _cut(self, step: Step, keep: list[float], in_sight: torch.Tensor | None = None) -> None:
        layer, method = step.layer, self.compression.method
        store, held = self.stores[layer], self.held[layer]
        shift = self._shifts.setdefault(layer, [0] * len(held))
        sinks, back = method.in_cache_sinks, method.reinserted
        all_pos = store.pos[:, 0].tolist()
        length = max(int(k) for k in keep)
        index = torch.zeros(len(held), length, dtype=torch.long)
        pos, delta = torch.full_like(index, -1), torch.zeros_like(index)
        for b, row in enumerate(all_pos):
            slots = [i for i, p in enumerate(row) if p >= 0]
            stale: list[int] = []
            if keep[b] < held[b]:
                window = int(keep[b]) - sinks - back
                dropped = slots[sinks : len(slots) - window]
                stale = [dropped[i] for i in evenly(len(dropped), back)]
                slots = slots[:sinks] + slots[len(slots) - window :]
                shift[b] += len(stale)
            first = row[-1] + 1
            places = [row[i] for i in slots] + [first + i for i in range(len(stale))]
            chosen = slots + stale
            at = slice(length - len(chosen), length)
            index[b, at], pos[b, at] = torch.tensor(chosen), torch.tensor(places)
            delta[b, at] = torch.tensor([new - row[i] for new, i in zip(places, chosen, strict=True)])
        keys, values = (rows_of(x, index.to(x.device)[:, None]) for x in (store.keys, store.values))
        if self.facts.rotates(layer):
            assert self.facts.rope is not None
            keys = self.facts.rope.rotate(keys, delta.to(keys.device), layer)
        fresh = [h == s for h, s in zip(held, self.seen, strict=True)]
        store.replace(
            Kept(keys, values, pos[:, None].to(store.pos), None, slots=index.to(store.pos.device)[:, None]),
            min(self.compression.schedule.compress_every, MAX_ROOM),
        )
        self.held[layer] = keep
        if self.facts.rotates(layer):
            self._move_sinks(layer, fresh)


def evenly(n: int, count: int) -> list[int]:
    """`count` of the numbers 0 .. n - 1, evenly spaced from the first to the last; all where there are no more."""
    if n <= count:
        return list(range(n))
    return sorted({round(i * (n - 1) / max(count - 1, 1)) for i in range(count)})

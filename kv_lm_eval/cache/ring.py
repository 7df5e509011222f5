"""Sinks and a window in a ring of fixed size: a new token overwrites the oldest one, nothing else moves.

StreamingLLM with a cut after every token drops one pair and adds one. Here the new pair takes the place of the one that
was dropped: slot S + (p - S) mod (W + 1) for the token at position p. The order of slots means nothing to attention,
since keys carry their rotation, so nothing is gathered or concatenated; only the S sinks are rotated again, from a
pristine copy, to follow the window. Shapes are the same at every token.

Shapes: B batch rows, K KV heads, S sinks, W window, D head size.
"""

from __future__ import annotations

import torch

from kv_lm_eval.cache.attention import Step
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.cache.store import LayerStore, rows_of
from kv_lm_eval.cache.transfer import to_device


class RingStore(LayerStore):
    """S + W + 1 slots a row: first the sinks, then the ring. Empty slots have pos -1."""

    def __init__(self, sinks: int, ring: int) -> None:
        super().__init__()
        self.sinks, self.ring = sinks, ring
        self.length = sinks + ring

    @classmethod
    def of(cls, store: LayerStore, sinks: int, ring: int) -> RingStore:
        """The same pairs in a ring; every row of the store holds its sinks, in order, after its empty slots."""
        new = cls(sinks, ring)
        keys, values, pos = store.keys, store.values, store.pos[:, 0].long()
        b, k, _, d = keys.shape
        new._keys = keys.new_zeros(b, k, new.length + 1, d)  # the last slot takes what belongs nowhere
        new._values = values.new_zeros(b, k, new.length + 1, values.shape[3])
        new._pos = store.pos.new_full((b, 1, new.length + 1), -1)
        new._put(keys, values, pos)
        new.pristine_sinks = new._keys[:, :, :sinks].clone()
        if store.pristine_sinks is not None:  # rows that have lost tokens have turned sinks
            lost = ((pos >= 0).sum(1) <= pos.max(1).values).view(-1, 1, 1, 1)
            new.pristine_sinks = torch.where(lost, store.pristine_sinks, new.pristine_sinks)
        return new

    def append(self, keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor) -> None:
        """One new pair a row: keys, values [B, K, 1, D], pos [B, 1]."""
        self._put(keys, values, pos)

    def _put(self, keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor) -> None:
        assert self._keys is not None and self._values is not None and self._pos is not None
        slots = torch.where(pos < self.sinks, pos, self.sinks + (pos - self.sinks) % self.ring)
        slots = torch.where(pos < 0, self.length, slots)
        for into, new in ((self._keys, keys), (self._values, values)):
            into.scatter_(2, slots[:, None, :, None].expand(-1, into.shape[1], -1, into.shape[3]), new)
        self._pos.scatter_(2, slots[:, None], pos[:, None].to(self._pos.dtype))
        self._pos[:, :, self.length :] = -1

    def unrolled(self) -> LayerStore:
        """The same pairs in order of position, empty slots first."""
        store = LayerStore()
        order = self.pos[:, 0].argsort(dim=-1, stable=True)
        store._keys, store._values = (rows_of(x, order[:, None]) for x in (self.keys, self.values))
        store._pos = self.pos.gather(2, order[:, None])
        store.length, store.pristine_sinks = self.length, self.pristine_sinks
        return store

    def _blank(self) -> LayerStore:
        return RingStore(self.sinks, self.ring)


class Ring(Segment):
    """A segment whose layers become rings when single tokens follow the prefill.

    Any other forward, of several tokens at once, is that of `Segment`, to which the layers return for it.
    """

    serves = ("ring",)

    def attend(self, step: Step) -> torch.Tensor:
        """[B, H, q, D]"""
        layer, store = step.layer, self.stores[step.layer]
        if self.mode == "decode" and step.tokens == 1 and self._rolls(layer):
            if not isinstance(store, RingStore):
                sinks = self.compression.method.sinks_and_recent or 0
                self.stores[layer] = RingStore.of(store, sinks, self._capacity + 1 - sinks)
        elif isinstance(store, RingStore):
            self._drop_unseen(layer, step.tokens)
            self.stores[layer] = store.unrolled()
        return super().attend(step)

    @property
    def _capacity(self) -> int:
        return int(self.compression.keep([2**31], [2**31], 0, self.facts.cut_layers)[0])

    def _rolls(self, layer: int) -> bool:
        """Whether the layer is cut at every token and every row has its sinks."""
        sinks, held = self.compression.method.sinks_and_recent or 0, self.held[layer]
        cut = self.facts.compressible(layer) and not self.stores[layer].is_empty
        return cut and sinks <= min(held) and max(held) <= self._capacity

    def _drop_unseen(self, layer: int, new: int) -> None:
        """Empties the slots of pairs that were cut and wait to be overwritten."""
        store, sinks = self.stores[layer], self.compression.method.sinks_and_recent or 0
        seen = to_device(self.seen, store.pos.device).view(-1, 1, 1)
        before = seen - (0 if self.mode == "score" else new)
        gone = (store.pos >= sinks) & (store.pos < before - (self._capacity - sinks))
        store.pos.masked_fill_(gone, -1)

    def has_empty(self, layer: int) -> bool:
        store = self.stores[layer]
        if not isinstance(store, RingStore):
            return super().has_empty(layer)
        return min(self.held[layer]) + 1 < store.length  # the new pair fills the one slot that is always free

    def _cut(self, step: Step, keep: list[float], in_sight: torch.Tensor | None = None) -> None:
        layer = step.layer
        if not isinstance(self.stores[layer], RingStore):
            super()._cut(step, keep, in_sight)
            return
        self.held[layer] = keep  # the pair that goes is overwritten by the next one
        if self.compression.method.in_cache_sinks and self.facts.rotates(layer):
            self._turn_sinks(layer)

    def _turn_sinks(self, layer: int) -> None:
        """Rotates every row's sinks forward by the number of tokens it has lost."""
        store, rope = self.stores[layer], self.facts.rope
        assert rope is not None and store.pristine_sinks is not None
        lost = tuple(seen - held for seen, held in zip(self.seen, self.held[layer], strict=True))
        delta = self._delta(lost, store.keys.device)
        store.keys[:, :, : store.pristine_sinks.shape[2]] = rope.rotate(store.pristine_sinks, delta, layer)

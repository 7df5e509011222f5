"""A layer whose older pairs are held in a few bits each, in the form that its storage says.

Shapes: B batch rows, K KV heads, N slots, M slots kept, E exact pairs, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kv_lm_eval.cache.coded import Coded, encode
from kv_lm_eval.cache.store import Kept, LayerStore, _own_storage, rows_of
from kv_lm_eval.cache.transfer import to_device
from kv_lm_eval.cache.view import AskedOfStorage


class QuantizedStore(LayerStore):
    """Storage of one layer: its oldest pairs coded, its newest (and the sinks that must stay so) exact.

    The base class keeps the slots: their order, positions, what the method observes. It is given keys and values of
    width nothing; the real ones are here, apart from the slots' order. Of each row and head, pairs are counted from the
    oldest: the first `sinks` are exact, then come the coded ones, then the residual. Empty slots have no place here, so
    that groups are those of the row alone, whatever it is padded to.

    What is quantised when: nothing during a forward, so that a prompt's own forward sees exact keys, as in KIVI; after
    it, and after the cut, `settle` codes those that `residual_length` newer pairs follow, in the storage's steps.

    Reading `keys` or `values` decodes the layer: for the time of its attention one layer is there in the model's number
    format (twice where rows or heads hold different numbers of pairs), and up to BLOCK_SLOTS pairs a row in float32.

    Args:
        sinks: first pairs that are never coded, because their keys are rewritten as the window moves.
    """

    def __init__(self, storage: AskedOfStorage, sinks: int) -> None:
        super().__init__()
        self.storage, self.sinks = storage, sinks
        self._exact_keys: torch.Tensor | None = None  # [B, K, capacity, D], those in use first
        self._exact_values: torch.Tensor | None = None
        self._coded_keys: Coded | None = None
        self._coded_values: Coded | None = None
        self.exact: list[list[int]] = []  # pairs by row and head, on the host: a decode step never asks the device
        self.coded: list[list[int]] = []
        self._asking: torch.Tensor | None = None  # [B, H, W, D] last queries, until these have chosen
        self._given: dict[str, torch.Tensor] = {}  # [B, K, ...] what keys are coded by, as these have chosen it
        self._saved: list[int] = []  # bytes by row that coding takes less than the same pairs exact

    # ------------------------------------------------------------------------------------ reading

    @property
    def keys(self) -> torch.Tensor:
        """[B, K, N, D], decoded."""
        return self._read(self._exact_keys, self._coded_keys)

    @property
    def values(self) -> torch.Tensor:
        """[B, K, N, D], decoded."""
        return self._read(self._exact_values, self._coded_values)

    def _read(self, exact: torch.Tensor | None, coded: Coded | None) -> torch.Tensor:
        """All slots in their order, [B, K, N, D]; empty ones hold any finite number."""
        assert exact is not None
        most = max(map(max, self.exact))
        width = 0 if coded is None else coded.pairs
        pool = exact[:, :, :most]
        if coded is not None:
            pool = torch.cat([exact[:, :, : self.sinks], coded.decode(), exact[:, :, self.sinks : most]], dim=2)
        if all(e == most and c == width for e, c in _pairs(self.exact, self.coded)) and pool.shape[2] == self.length:
            return pool
        if not pool.shape[2]:  # no row has a pair yet
            return exact.new_zeros(*exact.shape[:2], self.length, exact.shape[3])
        rank = (self.pos >= 0).cumsum(-1) - 1  # [B, 1 or K, N]
        counts = to_device(self.coded, pool.device).unsqueeze(-1)
        index = torch.where(rank < self.sinks + counts, rank, rank + width - counts)
        return rows_of(pool, index.clamp(0, pool.shape[2] - 1))

    # ------------------------------------------------------------------------------------ writing

    def append(self, keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor) -> None:
        """Adds q exact slots: keys, values [B, K, q, D], pos [B, q]."""
        b, k, q, _ = keys.shape
        super().append(keys[..., :0], values[..., :0], pos)
        if self._exact_keys is None or self._exact_values is None:
            self._exact_keys, self._exact_values = _own_storage(keys), _own_storage(values)
            self.exact, self.coded, self._saved = [[q] * k for _ in range(b)], [[0] * k for _ in range(b)], [0] * b
            return
        end = max(map(max, self.exact)) + q
        if end > self._exact_keys.shape[2]:
            room = end + self.storage.step
            self._exact_keys, self._exact_values = _grown(self._exact_keys, room), _grown(self._exact_values, room)
        at = to_device(self.exact, keys.device).unsqueeze(-1) + torch.arange(q, device=keys.device)
        for held, new in ((self._exact_keys, keys), (self._exact_values, values)):
            held.scatter_(2, at.unsqueeze(-1).expand_as(new), new)
        self.exact = [[e + q for e in row] for row in self.exact]

    def borrow(self, other: LayerStore, copies: int = 1) -> None:
        """As in `LayerStore`; all pairs are exact."""
        super().borrow(other, copies)
        assert self._keys is not None and self._values is not None
        self._exact_keys, self._exact_values = (
            self._keys,
            self._values,
        )  # no room behind them: added to, they are copied
        b, k, n, _ = self._keys.shape
        self._keys, self._values = self._keys[..., :0], self._values[..., :0]
        self.exact, self.coded, self._saved = [[n] * k for _ in range(b)], [[0] * k for _ in range(b)], [0] * b

    def watch(self, queries: torch.Tensor) -> None:
        """Holds the last queries of [B, H, q, D] until they have chosen what keys are coded by."""
        last = self.storage.watches
        if not last or self._given:
            return
        if self._asking is not None and queries.shape[2] < last:
            queries = torch.cat([self._asking, queries], dim=2)
        self._asking = queries[:, :, -last:].clone()

    def _choose(self) -> None:
        """Lets the last queries choose what keys are coded by, once, for all heads: when that is depends on how many
        tokens were seen, and not on what any row holds."""
        assert self._exact_keys is not None and self._asking is not None
        most = max(map(max, self.exact))
        real = torch.arange(most, device=self._asking.device) < to_device(self.exact, self._asking.device).unsqueeze(-1)
        self._given = self.storage.of_queries(self._exact_keys[:, :, :most], real, self._asking)
        self._asking = None

    def settle(self) -> None:
        assert self._exact_keys is not None and self._exact_values is not None
        if self.storage.watches and not self._given:
            self._choose()
        step, spare = self.storage.step, self.sinks + self.storage.residual_length
        leaving = [[max(0, e - spare) // step * step for e in row] for row in self.exact]
        most = max(map(max, leaving))
        if not most:
            return
        device = self._exact_keys.device
        out = to_device(leaving, device).unsqueeze(-1)
        real = torch.arange(most, device=device) < out
        part, moves = slice(self.sinks, self.sinks + most), _pairs(self.coded, leaving)
        even = all(pair == moves[0] for pair in moves)
        self.coded = [[c + m for c, m in zip(*rows, strict=True)] for rows in zip(self.coded, leaving, strict=True)]
        self.exact = [[e - m for e, m in zip(*rows, strict=True)] for rows in zip(self.exact, leaving, strict=True)]
        coded = []
        for exact, old, codec, given in (
            (self._exact_keys, self._coded_keys, self.storage.keys, self._given),
            (self._exact_values, self._coded_values, self.storage.values, None),
        ):
            new = encode(codec, exact[:, :, part], real, old, given)
            if old is not None:
                new = Coded.join([old, new])
            coded.append(new if even else self._closed(new, out, real))
        self._coded_keys, self._coded_values = coded
        self._keep_exact(self._exact_keys, self._exact_values, out)
        self._count()

    def _closed(self, joined: Coded, out: torch.Tensor, real: torch.Tensor) -> Coded:
        """The pairs without the gaps where rows or heads had fewer than others; the last ones have just been coded,
        `out` [B, K, 1] of them, `real` [B, K, n]."""
        counts, old = to_device(self.coded, out.device).unsqueeze(-1), joined.pairs - real.shape[2]
        valid = torch.cat([torch.arange(old, device=out.device) < counts - out, real], dim=2)
        order = (~valid).to(torch.uint8).argsort(dim=-1, stable=True)[..., : max(map(max, self.coded))]
        return joined.take(order, valid.gather(2, order))

    def replace(self, kept: Kept, room: int) -> None:
        """As in `LayerStore`, [B, K, M] slots; a pair that is kept keeps its codes."""
        b, k, m, _ = kept.keys.shape
        device, sinks = kept.keys.device, self.sinks
        assert kept.slots is not None, "codes follow their slots"
        rank = ((self.pos >= 0).cumsum(-1) - 1).expand(b, k, -1)  # each slot's place among its head's pairs
        slots = kept.slots.expand(b, k, -1)
        was, real = rank.gather(2, slots), (kept.pos >= 0).expand(b, k, -1)
        order = (~real).to(torch.uint8).argsort(dim=-1, stable=True)  # each head's pairs, the empty slots last
        keys, values = rows_of(kept.keys, order), rows_of(kept.values, order)
        was, real, place = was.gather(2, order), real.gather(2, order), torch.arange(m, device=device)
        coded = to_device(self.coded, device).unsqueeze(-1)
        inside = real & (was < sinks + coded) | (place < sinks)  # coded: those that follow the sinks without a gap
        inside = inside.cumprod(-1).bool() & real & (place >= sinks)
        counts, total = inside.sum(-1), real.sum(-1)
        self_coded, self_exact = counts.tolist(), (total - counts).tolist()
        if self._coded_keys is not None and self._coded_values is not None:
            part = slice(sinks, sinks + max(map(max, self_coded)))
            index = (was[..., part] - sinks).clamp(0, max(0, self._coded_keys.pairs - 1))
            there = (slots.gather(2, order)[..., part], index, inside[..., part])
            self._coded_keys, self._coded_values = (
                _followed(held, self.keys if first else self.values, x[:, :, part], there)
                for first, held, x in ((True, self._coded_keys, keys), (False, self._coded_values, values))
            )
        self.coded, self.exact = self_coded, self_exact
        super().replace(replace(kept, keys=kept.keys[..., :0], values=kept.values[..., :0]), room)
        self._keep_exact(keys, values, counts.unsqueeze(-1))
        self._count()

    def _keep_exact(self, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        """Holds the exact pairs that are left when `out` [B, K, 1] of these, which follow the sinks, are coded."""
        most = max(map(max, self.exact))
        place = torch.arange(most, device=keys.device)
        index = torch.where(place < self.sinks, place, place + out).clamp_max(keys.shape[2] - 1)
        room = most + self.storage.step  # tokens until the next pairs leave
        self._exact_keys, self._exact_values = _grown(rows_of(keys, index), room), _grown(rows_of(values, index), room)

    def write_sinks(self, index: torch.Tensor, keys: torch.Tensor) -> None:
        """Puts keys [B, K, S, D] in the place of the exact ones that come first."""
        assert self._exact_keys is not None and keys.shape[2] == self.sinks
        self._exact_keys[:, :, : self.sinks] = keys  # where a row has fewer, the rest is not in use yet

    def select(self, rows: Sequence[int]) -> QuantizedStore:
        new, chosen = super().select(rows), torch.tensor(rows)
        assert isinstance(new, QuantizedStore)
        for name in ("_exact_keys", "_exact_values", "_asking"):
            held = getattr(self, name)
            setattr(new, name, None if held is None else held.index_select(0, chosen.to(held.device)))
        new._given = {name: x.index_select(0, chosen.to(x.device)) for name, x in self._given.items()}
        for name in ("_coded_keys", "_coded_values"):
            coded = getattr(self, name)
            setattr(new, name, None if coded is None else coded.select(chosen))
        for name in ("exact", "coded", "_saved"):  # lists that are replaced, never written into
            if not self.is_empty:
                setattr(new, name, [getattr(self, name)[i] for i in rows])
        return new

    def _blank(self) -> QuantizedStore:
        return QuantizedStore(self.storage, self.sinks)

    # ------------------------------------------------------------------------------------ bytes

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of keys and values of one exact pair of one KV head."""
        return sum(x.shape[3] * x.element_size() for x in (self._exact_keys, self._exact_values) if x is not None)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the codes, what groups and heads of them share, and the exact pairs with their headroom."""
        exact = sum(x.numel() * x.element_size() for x in (self._exact_keys, self._exact_values) if x is not None)
        return exact + sum(x.allocated_bytes for x in (self._coded_keys, self._coded_values) if x is not None)

    @property
    def overhead_bytes(self) -> int:
        """As in `LayerStore`, and the last queries until they have chosen what keys are coded by, which is counted with
        the codes."""
        asking = 0 if self._asking is None else self._asking.numel() * self._asking.element_size()
        return super().overhead_bytes + asking

    @property
    def shared(self) -> Sequence[torch.Tensor]:
        """Codebooks [C] and rotations [D, D], where any pair is coded with them."""
        held = [x for x in (self._coded_keys, self._coded_values) if x is not None]
        return [t for x in held for t in x.codec.tables(x.size, x.tensors[0].device)]

    def valid_bytes(self, held: Sequence[float]) -> list[float]:
        return [
            plain - saved
            for plain, saved in zip(super().valid_bytes(held), self._saved or [0] * len(held), strict=True)
        ]

    def _count(self) -> None:
        """Notes what coding saves, so that the numbers of a decode step need nothing of the device."""
        self._saved = [0] * len(self.coded)
        if self._coded_keys is not None and self._coded_values is not None:
            counts = torch.tensor(self.coded)
            taken = (self._coded_keys.valid_bytes(counts), self._coded_values.valid_bytes(counts))
            slot = self.bytes_per_slot
            self._saved = [sum(row) * slot - x - y for row, x, y in zip(self.coded, *taken, strict=True)]


def _followed(
    held: Coded, before: torch.Tensor, x: torch.Tensor, there: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> Coded:
    """The coded pairs after a cut: those that read [B, K, m, D] as they did keep their codes.

    Args:
        before: [B, K, N, D] the layer as it was read. x: [B, K, m, D] the pairs now.
        there: [B, K, m] each, the slot before the cut, the place among the coded pairs, and whether it is one.
    """
    slots, index, real = there
    return held.cut(index, real, (rows_of(before, slots) != x).any(-1), x)


def _grown(x: torch.Tensor, slots: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:2], slots - x.shape[2], x.shape[3])], dim=2)


def _pairs(a: list[list[int]], b: list[list[int]]) -> list[tuple[int, int]]:
    return [pair for rows in zip(a, b, strict=True) for pair in zip(*rows, strict=True)]

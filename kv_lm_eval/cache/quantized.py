"""A layer whose older pairs are held in a few bits: codes packed in bytes, with the scale and zero of each group.

Shapes: B batch rows, K KV heads, N slots, n coded pairs, E exact pairs, T groups, D head size, P groups across a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kv_lm_eval.cache.store import Kept, LayerStore, _own_storage, rows_of
from kv_lm_eval.cache.transfer import to_device
from kv_lm_eval.cache.view import AskedOfStorage

BLOCK_SLOTS = 4096  # pairs a row that are coded, or read back, at a time: bounds what this takes beside its result


@dataclass
class Packed:
    """Keys, or values, of n pairs in nbits each. A pair once coded is never coded again, whatever is cut around it.

    Attributes:
        codes: [B, K, n, bytes of a pair] uint8, 8 // nbits numbers a byte, along the head.
        scale, zero: float16 step and smallest value of each group: [B, K, T, D] with axis "channel", where a group is
            pairs of one channel; [B, K, n, P] with axis "token", where it is channels of one pair.
        group: [B, K, n] which of the T groups a pair belongs to, int16 (int32 beyond 32,767); None with axis "token".
        size: D. dtype: of what is read back.
    """

    storage: AskedOfStorage
    axis: str
    size: int
    dtype: torch.dtype
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group: torch.Tensor | None

    @classmethod
    def encode(cls, x: torch.Tensor, real: torch.Tensor, storage: AskedOfStorage, axis: str) -> Packed:
        """Codes x [B, K, n, D]; pairs that are not real [B, K, n] take no part in their group.

        Error: at most half a step of the group, and what float16 rounds off its scale and zero.
        """
        most = max(1, BLOCK_SLOTS // storage.group_size) * storage.group_size
        parts = zip(x.split(most, dim=2), real.split(most, dim=2), strict=True)
        return cls.join([cls._encode_block(*part, storage, axis) for part in parts])

    @classmethod
    def _encode_block(cls, x: torch.Tensor, real: torch.Tensor, storage: AskedOfStorage, axis: str) -> Packed:
        b, k, n, size = x.shape
        width, levels = storage.group_size, 2**storage.nbits - 1
        numbers = x.float().masked_fill(~real.unsqueeze(-1), 0.0)
        if axis == "channel":
            numbers = torch.nn.functional.pad(numbers, (0, 0, 0, -n % width))
            there = torch.nn.functional.pad(real, (0, -n % width)).view(b, k, -1, width, 1)
            grouped = numbers.view(b, k, -1, width, size)
            low = grouped.masked_fill(~there, float("inf")).amin(3, keepdim=True)
            high = grouped.masked_fill(~there, float("-inf")).amax(3, keepdim=True)
            low, high = (torch.where(there.any(3, keepdim=True), x, 0.0) for x in (low, high))
        else:
            width = min(width, size)
            last = numbers[..., -1:].expand(-1, -1, -1, -size % width)  # a short last group changes no minimum
            grouped = torch.cat([numbers, last], dim=-1).view(b, k, n, -1, width)
            low, high = grouped.amin(4, keepdim=True), grouped.amax(4, keepdim=True)
        zero = low.half()
        scale = ((high - zero.float()) / levels).clamp_min(0).half()
        step = torch.where(scale == 0, 1.0, scale.float())
        codes = ((grouped - zero.float()) / step).round().clamp(0, levels).to(torch.uint8)
        if axis == "channel":
            codes = codes.view(b, k, -1, size)[:, :, :n]
            group = _narrow(torch.arange(n, device=x.device) // width).expand(b, k, n).contiguous()
            scale, zero = scale.squeeze(3), zero.squeeze(3)
        else:
            codes, group = codes.view(b, k, n, -1)[..., :size], None
            scale, zero = scale.squeeze(4), zero.squeeze(4)
        return cls(storage, axis, size, x.dtype, _pack(codes, storage.nbits), scale, zero, group)

    def decode(self) -> torch.Tensor:
        """The pairs in the model's number format, [B, K, n, D]."""
        out = self.scale.new_empty(*self.codes.shape[:3], self.size, dtype=self.dtype)
        for first in range(0, out.shape[2], BLOCK_SLOTS):
            part = slice(first, first + BLOCK_SLOTS)
            codes = _unpack(self.codes[:, :, part], self.storage.nbits)[..., : self.size]
            out[:, :, part] = codes * self._spread(self.scale, part) + self._spread(self.zero, part)
        return out

    def _spread(self, table: torch.Tensor, part: slice) -> torch.Tensor:
        """The entry of each number of the given pairs: [B, K, slots, D] float32."""
        if self.group is None:
            width = min(self.storage.group_size, self.size)
            return table[:, :, part].float().repeat_interleave(width, dim=-1)[..., : self.size]
        return rows_of(table, self.group[:, :, part].long()).float()

    def take(self, index: torch.Tensor, real: torch.Tensor) -> Packed:
        """The pairs at index [B, K, m], codes as they are; groups of which no real one is among them are dropped."""
        codes = rows_of(self.codes, index)
        if self.group is None:
            return replace(self, codes=codes, scale=rows_of(self.scale, index), zero=rows_of(self.zero, index))
        group = self.group.long().gather(2, index)
        used = torch.zeros(self.scale.shape[:3], dtype=torch.int32, device=codes.device)
        used.scatter_add_(2, group, real.int())
        alive = used > 0
        order = (~alive).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(alive.sum(-1).max())]
        number = (alive.cumsum(-1) - 1).clamp_min(0)
        group = _narrow(number.gather(2, group))
        return replace(self, codes=codes, scale=rows_of(self.scale, order), zero=rows_of(self.zero, order), group=group)

    @staticmethod
    def join(parts: Sequence[Packed]) -> Packed:
        """All pairs, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        group, before = None, list(itertools.accumulate((p.scale.shape[2] for p in parts), initial=0))
        if parts[0].group is not None:
            numbers = [p.group.long() + n for p, n in zip(parts, before, strict=False) if p.group is not None]
            group = _narrow(torch.cat(numbers, dim=2))
        codes, scale, zero = (
            torch.cat([getattr(p, name) for p in parts], dim=2) for name in ("codes", "scale", "zero")
        )
        return replace(parts[0], codes=codes, scale=scale, zero=zero, group=group)

    def cut(self, x: torch.Tensor, index: torch.Tensor, real: torch.Tensor) -> Packed:
        """The pairs that were at index [B, K, m] and now are x [B, K, m, D].

        One that reads back as x keeps its codes, so that nothing drifts however often it survives; one that a treatment
        of the evicted has changed (an average, a merge) is coded anew, in groups of such pairs.
        """
        stays = self.take(index, real)
        changed = real & (stays.decode() != x).any(-1)
        most = int(changed.sum(-1).max())
        if not most:
            return stays
        order = (~changed).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
        new = Packed.encode(rows_of(x, order), changed.gather(2, order), self.storage, self.axis)
        slots = torch.arange(x.shape[2], device=x.device)
        return Packed.join([stays, new]).take(torch.where(changed, x.shape[2] + changed.cumsum(-1) - 1, slots), real)

    def select(self, rows: torch.Tensor) -> Packed:
        """A copy that holds the given rows, [R] of them."""
        rows = rows.to(self.codes.device)
        group = None if self.group is None else self.group.index_select(0, rows)
        parts = {name: getattr(self, name).index_select(0, rows) for name in ("codes", "scale", "zero")}
        return replace(self, group=group, **parts)

    @property
    def allocated_bytes(self) -> int:
        held = (self.codes, self.scale, self.zero, self.group)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def valid_bytes(self, counts: torch.Tensor) -> list[int]:
        """Bytes of each row's own pairs and groups; counts: [B, K] pairs."""
        table = 2 * self.scale.element_size() * self.scale.shape[3]
        pair = self.codes.shape[3]
        if self.group is None:
            return [int(row.sum()) * (pair + table) for row in counts]
        slots = torch.arange(self.group.shape[2], device=self.group.device)
        real = slots < counts.to(slots.device).unsqueeze(-1)
        groups = torch.where(real, self.group.long(), -1).amax(-1) + 1 if len(slots) else counts * 0
        pair += self.group.element_size()
        return (counts.to(groups.device) * pair + groups * table).sum(1).tolist()


class QuantizedStore(LayerStore):
    """Storage of one layer: its oldest pairs coded, its newest (and the sinks that must stay so) exact.

    The base class keeps the slots: their order, positions, what the method observes. It is given keys and values of
    width nothing; the real ones are here, apart from the slots' order. Of each row and head, pairs are counted from the
    oldest: the first `sinks` are exact, then come the coded ones, then the residual. Empty slots have no place here, so
    that groups are those of the row alone, whatever it is padded to.

    What is quantised when: nothing during a forward, so that a prompt's own forward sees exact keys, as in KIVI; after
    it, and after the cut, `settle` codes full groups that `residual_length` newer pairs follow.

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
        self._coded_keys: Packed | None = None
        self._coded_values: Packed | None = None
        self.exact: list[list[int]] = []  # pairs by row and head, on the host: a decode step never asks the device
        self.coded: list[list[int]] = []
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

    def _read(self, exact: torch.Tensor | None, coded: Packed | None) -> torch.Tensor:
        """All slots in their order, [B, K, N, D]; empty ones hold any finite number."""
        assert exact is not None
        most = max(map(max, self.exact))
        width = 0 if coded is None else coded.codes.shape[2]
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
            room = end + self.storage.group_size
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

    def settle(self) -> None:
        assert self._exact_keys is not None and self._exact_values is not None
        size, spare = self.storage.group_size, self.sinks + self.storage.residual_length
        leaving = [[max(0, e - spare) // size * size for e in row] for row in self.exact]
        most = max(map(max, leaving))
        if not most:
            return
        device = self._exact_keys.device
        out = to_device(leaving, device).unsqueeze(-1)
        real = torch.arange(most, device=device) < out
        before = to_device(self.coded, device).unsqueeze(-1)
        self.coded = [[c + m for c, m in zip(*rows, strict=True)] for rows in zip(self.coded, leaving, strict=True)]
        self.exact = [[e - m for e, m in zip(*rows, strict=True)] for rows in zip(self.exact, leaving, strict=True)]
        part = slice(self.sinks, self.sinks + most)
        storage, coded = self.storage, []
        for exact, old, axis in (
            (self._exact_keys, self._coded_keys, storage.key_axis),
            (self._exact_values, self._coded_values, storage.value_axis),
        ):
            new = Packed.encode(exact[:, :, part], real, storage, axis)
            valid = real
            if old is not None:
                new = Packed.join([old, new])
                valid = torch.cat([torch.arange(old.codes.shape[2], device=device) < before, real], dim=2)
            order = (~valid).to(torch.uint8).argsort(dim=-1, stable=True)[..., : max(map(max, self.coded))]
            coded.append(new.take(order, valid.gather(2, order)))
        self._coded_keys, self._coded_values = coded
        self._keep_exact(self._exact_keys, self._exact_values, out)
        self._count()

    def replace(self, kept: Kept, room: int) -> None:
        """As in `LayerStore`, [B, K, M] slots; a pair that is kept keeps its codes."""
        b, k, m, _ = kept.keys.shape
        device, sinks = kept.keys.device, self.sinks
        assert kept.slots is not None, "codes follow their slots"
        rank = ((self.pos >= 0).cumsum(-1) - 1).expand(b, k, -1)  # each slot's place among its head's pairs
        was = rank.gather(2, kept.slots.expand(b, k, -1))
        real = (kept.pos >= 0).expand(b, k, -1)
        super().replace(replace(kept, keys=kept.keys[..., :0], values=kept.values[..., :0]), room)
        order = (
            (~real).to(torch.uint8).argsort(dim=-1, stable=True)
        )  # each row's and head's pairs, the empty slots last
        keys, values = rows_of(kept.keys, order), rows_of(kept.values, order)
        was, real, place = was.gather(2, order), real.gather(2, order), torch.arange(m, device=device)
        coded = to_device(self.coded, device).unsqueeze(-1)
        inside = real & (was < sinks + coded) | (
            place < sinks
        )  # coded pairs: those that follow the sinks without a gap
        inside = inside.cumprod(-1).bool() & real & (place >= sinks)
        counts, total = inside.sum(-1), real.sum(-1)
        self.coded, self.exact = counts.tolist(), (total - counts).tolist()
        end = sinks + max(map(max, self.coded))
        index, inside = (was[..., sinks:end] - sinks).clamp_min(0), inside[..., sinks:end]
        if end == sinks:
            self._coded_keys = self._coded_values = None
        else:
            assert self._coded_keys is not None and self._coded_values is not None
            index = index.clamp_max(self._coded_keys.codes.shape[2] - 1)
            self._coded_keys = self._coded_keys.cut(keys[:, :, sinks:end], index, inside)
            self._coded_values = self._coded_values.cut(values[:, :, sinks:end], index, inside)
        self._keep_exact(keys, values, counts.unsqueeze(-1))
        self._count()

    def _keep_exact(self, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        """Holds the exact pairs that are left when `out` [B, K, 1] of these, which follow the sinks, are coded."""
        most = max(map(max, self.exact))
        place = torch.arange(most, device=keys.device)
        index = torch.where(place < self.sinks, place, place + out).clamp_max(keys.shape[2] - 1)
        room = most + self.storage.group_size  # tokens until the next groups leave
        self._exact_keys, self._exact_values = _grown(rows_of(keys, index), room), _grown(rows_of(values, index), room)

    def write_sinks(self, index: torch.Tensor, keys: torch.Tensor) -> None:
        """Puts keys [B, K, S, D] in the place of the exact ones that come first."""
        assert self._exact_keys is not None and keys.shape[2] == self.sinks
        self._exact_keys[:, :, : self.sinks] = keys  # where a row has fewer, the rest is not in use yet

    def select(self, rows: Sequence[int]) -> QuantizedStore:
        new, chosen = super().select(rows), torch.tensor(rows)
        assert isinstance(new, QuantizedStore)
        for name in ("_exact_keys", "_exact_values"):
            held = getattr(self, name)
            setattr(new, name, None if held is None else held.index_select(0, chosen.to(held.device)))
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
        """Bytes of the codes, the scales and zeros, the groups' numbers and the exact pairs with their headroom."""
        exact = sum(x.numel() * x.element_size() for x in (self._exact_keys, self._exact_values) if x is not None)
        return exact + sum(x.allocated_bytes for x in (self._coded_keys, self._coded_values) if x is not None)

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


def _pack(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """[..., D] numbers under 2**nbits as [..., ceil(D * nbits / 8)] bytes, the first in the lowest bits."""
    each = 8 // nbits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    out = codes[..., 0].clone()
    for i in range(1, each):
        out |= codes[..., i] << (i * nbits)
    return out


def _unpack(packed: torch.Tensor, nbits: int) -> torch.Tensor:
    """The numbers again, uint8; those that filled the last byte included."""
    parts = [(packed >> shift) & (2**nbits - 1) for shift in range(0, 8, nbits)]
    return torch.stack(parts, dim=-1).flatten(-2)


def _narrow(numbers: torch.Tensor) -> torch.Tensor:
    """Group numbers in the narrowest type that has room for as many groups as there are pairs."""
    return numbers.to(torch.int16 if numbers.shape[-1] < 2**15 else torch.int32)


def _grown(x: torch.Tensor, slots: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:2], slots - x.shape[2], x.shape[3])], dim=2)


def _pairs(a: list[list[int]], b: list[list[int]]) -> list[tuple[int, int]]:
    return [pair for rows in zip(a, b, strict=True) for pair in zip(*rows, strict=True)]

"""Pairs in a form of their own: what each of them is held as, what groups of them share, and what a head's pairs share.

A form of storage is a `Codec` for keys and one for values. What happens to coded pairs as the cache is cut, copied and
joined is here, the same for all forms.

Shapes: B batch rows, K KV heads, n coded pairs, m of them, T groups, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, prod
from typing import Protocol

import torch

from kv_lm_eval.cache.store import rows_of

BLOCK_SLOTS = 4096  # pairs a row that are coded, or read back, at a time: bounds what this takes beside its result


class Codec(Protocol):
    """How keys, or values, are coded and read back."""

    @property
    def block(self) -> int:
        """Consecutive pairs that must be coded together; 1: each is coded for itself."""

    def tables(self, size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """What all vectors of so many numbers that are coded so share, whatever row, head or layer they are of: tables
        [...] of any shape."""

    def of_head(
        self, x: torch.Tensor, real: torch.Tensor, before: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What all pairs of a head share, [B, K, ...] by name: from its first pairs x [B, K, n, D], of which some are
        real [B, K, n], and as it was `before` where there was any."""

    def encode(self, x: torch.Tensor, real: torch.Tensor, of_head: dict[str, torch.Tensor]) -> Coded:
        """Pairs x [B, K, n, D], at most BLOCK_SLOTS; those that are not real [B, K, n] are coded as anything."""

    def decode(self, part: Coded) -> torch.Tensor:
        """The pairs again, [B, K, n, D] in any number format, at most BLOCK_SLOTS of them."""


@dataclass
class Coded:
    """Keys, or values, of n pairs. A pair once coded is never coded again, whatever is cut around it.

    Attributes:
        size: D. dtype: of what is read back.
        of_pair: what each pair is held as, [B, K, n, ...] by name.
        group: [B, K, n] which of the T groups a pair belongs to, int16 (int32 beyond 32,767); None: there are none.
        of_group: what the pairs of a group share, [B, K, T, ...] by name.
        of_head: what all pairs of a head share, [B, K, ...] by name.
    """

    codec: Codec
    size: int
    dtype: torch.dtype
    of_pair: dict[str, torch.Tensor]
    of_head: dict[str, torch.Tensor] = field(default_factory=dict)
    of_group: dict[str, torch.Tensor] = field(default_factory=dict)
    group: torch.Tensor | None = None

    @property
    def pairs(self) -> int:
        """n."""
        return next(iter(self.of_pair.values())).shape[2]

    def decode(self) -> torch.Tensor:
        """The pairs in the model's number format, [B, K, n, D]."""
        first = next(iter(self.of_pair.values()))
        out = first.new_empty(*first.shape[:3], self.size, dtype=self.dtype)
        for start in range(0, self.pairs, BLOCK_SLOTS):
            part = slice(start, start + BLOCK_SLOTS)
            out[:, :, part] = self.codec.decode(self._part(part))
        return out

    def _part(self, part: slice) -> Coded:
        group = None if self.group is None else self.group[:, :, part]
        return replace(self, of_pair={name: x[:, :, part] for name, x in self.of_pair.items()}, group=group)

    def take(self, index: torch.Tensor, real: torch.Tensor) -> Coded:
        """The pairs at index [B, K, m], as they are; groups of which no real one is among them are dropped."""
        of_pair = {name: rows_of(x, index) for name, x in self.of_pair.items()}
        if self.group is None:
            return replace(self, of_pair=of_pair)
        group = self.group.long().gather(2, index)
        b, k, n = (*index.shape[:2], self._groups)
        used = torch.zeros(b, k, n, dtype=torch.int32, device=index.device).scatter_add_(2, group, real.int())
        alive = used > 0
        order = (~alive).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(alive.sum(-1).max())]
        number = (alive.cumsum(-1) - 1).clamp_min(0)
        of_group = {name: rows_of(x, order) for name, x in self.of_group.items()}
        return replace(self, of_pair=of_pair, of_group=of_group, group=narrow(number.gather(2, group)))

    @property
    def _groups(self) -> int:
        """T."""
        return next(iter(self.of_group.values())).shape[2]

    @staticmethod
    def join(parts: Sequence[Coded]) -> Coded:
        """All pairs, one part after the other; what a head shares is that of the last."""
        last = parts[-1]
        if len(parts) == 1:
            return last

        def together(tables: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
            return {name: torch.cat([table[name] for table in tables], dim=2) for name in tables[0]}

        group = None
        if last.group is not None:
            before = itertools.accumulate((p._groups for p in parts), initial=0)
            numbers = [p.group.long() + n for p, n in zip(parts, before, strict=False) if p.group is not None]
            group = narrow(torch.cat(numbers, dim=2))
        of_pair, of_group = together([p.of_pair for p in parts]), together([p.of_group for p in parts])
        return replace(last, of_pair=of_pair, of_group=of_group, group=group)

    def cut(self, index: torch.Tensor, real: torch.Tensor, changed: torch.Tensor, x: torch.Tensor) -> Coded:
        """The pairs that were at index [B, K, m]. One that is real and that a treatment of the evicted has changed
        (an average, a merge), [B, K, m] each, is coded anew from x [B, K, m, D], in groups of such pairs; the others
        keep their codes, so that nothing drifts however often they survive."""
        stays, changed = self.take(index, real), real & changed
        most = int(changed.sum(-1).max()) if changed.numel() else 0
        if not most:
            return stays
        order = (~changed).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
        new = encode(self.codec, rows_of(x, order), changed.gather(2, order), self)
        slots = torch.arange(x.shape[2], device=x.device)
        return Coded.join([stays, new]).take(torch.where(changed, x.shape[2] + changed.cumsum(-1) - 1, slots), real)

    def select(self, rows: torch.Tensor) -> Coded:
        """A copy that holds the given rows, [R] of them."""
        tables = [
            {name: x.index_select(0, rows.to(x.device)) for name, x in table.items()}
            for table in (self.of_pair, self.of_head, self.of_group)
        ]
        group = None if self.group is None else self.group.index_select(0, rows.to(self.group.device))
        return replace(self, of_pair=tables[0], of_head=tables[1], of_group=tables[2], group=group)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that is held, [B, K, ...] each."""
        held = [x for table in (self.of_pair, self.of_head, self.of_group) for x in table.values()]
        return held if self.group is None else [*held, self.group]

    @property
    def allocated_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def valid_bytes(self, counts: torch.Tensor) -> list[int]:
        """Bytes of each row's own pairs, groups and heads that have any; counts: [B, K] pairs, on the host."""
        pair, head = _bytes_each(self.of_pair, 3), _bytes_each(self.of_head, 2)
        heads = (counts > 0) * head
        if self.group is None:
            return (counts * pair + heads).sum(1).tolist()
        slots = torch.arange(self.pairs, device=self.group.device)
        real = slots < counts.to(slots.device).unsqueeze(-1)
        used = self.group.new_zeros(*self.group.shape[:2], self._groups, dtype=torch.int32)
        groups = (used.scatter_add_(2, self.group.long(), real.int()) > 0).sum(-1)
        pair += self.group.element_size()
        own = (counts * pair + heads).to(groups.device)
        return (own + groups * _bytes_each(self.of_group, 3)).sum(1).tolist()


def encode(
    codec: Codec,
    x: torch.Tensor,
    real: torch.Tensor,
    before: Coded | None = None,
    given: Mapping[str, torch.Tensor] | None = None,
) -> Coded:
    """Codes x [B, K, n, D]; pairs that are not real [B, K, n] take no part in what others share.

    Args:
        before: what was coded of the same rows and heads earlier; what a head shares stays as it is there.
        given: what a head shares where nothing was coded before, if it is known already, [B, K, ...] by name.
    """
    of_head = codec.of_head(x, real, (given or {}) if before is None else before.of_head)
    most = max(1, BLOCK_SLOTS // codec.block) * codec.block
    parts = zip(x.split(most, dim=2), real.split(most, dim=2), strict=True)
    return Coded.join([codec.encode(*part, of_head) for part in parts])


def pack(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """[..., D] numbers under 2**nbits as [..., ceil(D * nbits / 8)] bytes: one after the other without a gap, the first
    in the lowest bits."""
    each, size, word = _words(nbits)
    needed = -(-codes.shape[-1] * nbits // 8)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    out = codes[..., 0].to(word, copy=True)
    for i in range(1, each):
        out |= codes[..., i].to(word) << (i * nbits)
    if size == 1:
        return out
    filled = torch.stack([(out >> 8 * i & 255).to(torch.uint8) for i in range(size)], dim=-1).flatten(-2)
    return filled[..., :needed].contiguous()


def unpack(packed: torch.Tensor, nbits: int) -> torch.Tensor:
    """The numbers again, [..., bytes] to uint8 [..., numbers]; those that filled the last byte included."""
    each, size, word = _words(nbits)
    if size > 1:
        parts = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % size)).unflatten(-1, (-1, size))
        packed = parts[..., 0].to(word)
        for i in range(1, size):
            packed |= parts[..., i].to(word) << (8 * i)
    numbers = [(packed >> (i * nbits) & (2**nbits - 1)).to(torch.uint8) for i in range(each)]
    return torch.stack(numbers, dim=-1).flatten(-2)


def _words(nbits: int) -> tuple[int, int, torch.dtype]:
    """The fewest numbers that fill whole bytes, how many bytes, and what holds these."""
    shared = gcd(8, nbits)
    return 8 // shared, nbits // shared, torch.uint8 if nbits == shared else torch.int64


def narrow(numbers: torch.Tensor) -> torch.Tensor:
    """Group numbers [..., n] in the narrowest type that has room for as many groups as there are pairs."""
    return numbers.to(torch.int16 if numbers.shape[-1] < 2**15 else torch.int32)


def _bytes_each(tables: dict[str, torch.Tensor], dims: int) -> int:
    """Bytes of one entry of tables whose first `dims` dimensions count entries."""
    return sum(prod(x.shape[dims:]) * x.element_size() for x in tables.values())

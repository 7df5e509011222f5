"""One layer's slots: keys, values, original positions, and what the method observes.

Shapes: B batch rows, H query heads, K KV heads, N slots, M slots kept, W last queries, D head size.

Slots are in the order in which their tokens came. Where rows or heads hold different numbers of slots, the empty ones
(pos = -1) come first, so that the slots of a head stand as they do alone. A cut of a few pairs may leave empty slots in
between, for methods that do not look at neighbours, until there is no room for a new pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kv_lm_eval.cache.moments import QueryMoments
from kv_lm_eval.cache.transfer import at_least_float32, to_device

MIN_HEADROOM = 64  # slots allocated beyond those in use, so that decoding does not reallocate at every token


@dataclass
class Kept:
    """What a layer holds after a cut: keys, values [B, K, M, D], pos [B, 1 or K, M], mass [B, K, M].

    Empty slots come first, with pos -1. bias: [B, K, M] float32 or None, added to the attention logits of each slot.
    memory: [B, K] float32 or None, what the treatment of the evicted remembers until its next cut.
    slots: [B, 1 or K, M] the slot before the cut that each was, or whose place it takes; positions may be doubled.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pos: torch.Tensor
    mass: torch.Tensor | None
    bias: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    slots: torch.Tensor | None = None


class LayerStore:
    """Growing, preallocated storage of one layer.

    Attributes:
        length: slots in use per row, empty ones included (N).
        holes: whether cuts have emptied slots in their places since everything was moved.
        lent: whether the tensors are another store's, which are read and never written.
        pos: [B, 1 or K, N] original position of each slot's token, -1 where empty.
        mass: [B, K, N] attention received so far, or None if the method does not ask for it.
        bias: [B, K, N] float32 added to each slot's attention logits, or None: nothing is added.
        memory: [B, K] what the treatment of the evicted remembers, or None.
        moments: mean and covariance of the queries so far, or None if the method does not ask for them.
        queries, query_pos: the last W queries [B, H, W, D] and their positions [B, W], or None.
    """

    def __init__(self) -> None:
        self.length = 0
        self.holes = False
        self.lent = False
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._pos: torch.Tensor | None = None
        self._mass: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self.memory: torch.Tensor | None = None
        self.moments: QueryMoments | None = None
        self.queries: torch.Tensor | None = None
        self.query_pos: torch.Tensor | None = None
        self.pristine_sinks: torch.Tensor | None = None  # [B, K, S, D] sink keys as the model made them

    @property
    def keys(self) -> torch.Tensor:
        """[B, K, N, D]."""
        assert self._keys is not None
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> torch.Tensor:
        """[B, K, N, D]."""
        assert self._values is not None
        return self._values[:, :, : self.length]

    @property
    def pos(self) -> torch.Tensor:
        """[B, 1 or K, N]."""
        assert self._pos is not None
        return self._pos[:, :, : self.length]

    @property
    def mass(self) -> torch.Tensor | None:
        """[B, K, N], or None."""
        return None if self._mass is None else self._mass[:, :, : self.length]

    @property
    def bias(self) -> torch.Tensor | None:
        """[B, K, N], or None."""
        return None if self._bias is None else self._bias[:, :, : self.length]

    @property
    def is_empty(self) -> bool:
        return self._keys is None

    @property
    def shape(self) -> tuple[object, ...]:
        """Of all that belongs to a row: stores of one shape hold their rows alike."""
        held = (self._mass, self._bias, self.memory, self.queries, self.moments, self.pristine_sinks)
        there = [None if x is None else True for x in held]
        width = None if self.queries is None else self.queries.shape[2]
        return (self.length, self.pos.shape[1], self.keys.shape[1], width, *there)

    def append(self, keys: torch.Tensor, values: torch.Tensor, pos: torch.Tensor) -> None:
        """Adds q slots: keys, values [B, K, q, D], pos [B, q]."""
        q = keys.shape[2]
        if self._keys is None or self._values is None or self._pos is None:
            self._keys, self._values = _own_storage(keys), _own_storage(values)
            self._pos = pos.unsqueeze(1).to(torch.int32)
            self.length = q
            return
        if self.length + q > self._keys.shape[2]:
            self._reallocate(self.length + q + max(MIN_HEADROOM, self.length // 8))
        end = self.length + q
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self._pos[:, :, self.length : end] = pos.unsqueeze(1)
        if self._mass is not None:
            self._mass[:, :, self.length : end] = 0
        if self._bias is not None:
            self._bias[:, :, self.length : end] = 0
        self.length = end

    def borrow(self, other: LayerStore, copies: int = 1) -> None:
        """Holds all slots of another store, in its tensors; what was observed here stays. There is no room behind them,
        so that whoever adds to them makes a copy.

        Args:
            copies: of each head, for those who hold one for every query head.
        """
        self._keys, self._values = other.keys, other.values
        if copies > 1:
            self._keys, self._values = (x.repeat_interleave(copies, dim=1) for x in (self._keys, self._values))
        self._pos, self.length, self.holes, self.lent = other.pos, other.length, other.holes, True
        if self._mass is not None:
            self._mass = F.pad(self._mass, (0, self.length - self._mass.shape[2]))

    def add_mass(self, mass: torch.Tensor) -> None:
        """Adds attention received by the slots in use: [B, K, N]."""
        if self._mass is None:
            assert self._keys is not None
            self._mass = mass.new_zeros(*self._keys.shape[:3])
        self._mass[:, :, : self.length] += mass

    def note_mass(self, first: int, mass: torch.Tensor) -> None:
        """Puts attention [B, K, n] down for the slots from `first` on, in the place of what was there."""
        if self._mass is None:
            assert self._keys is not None
            self._mass = mass.new_zeros(*self._keys.shape[:3])
        self._mass[:, :, first : first + mass.shape[2]] = mass

    def observe(self, queries: torch.Tensor, pos: torch.Tensor, last: int) -> None:
        """Keeps each row's last `last` queries of [B, H, q, D] with their positions [B, q]."""
        if self.queries is not None and self.query_pos is not None and queries.shape[2] < last:
            queries = torch.cat([self.queries, queries], dim=2)
            pos = torch.cat([self.query_pos, pos], dim=1)
        self.queries = queries[:, :, -last:].clone()
        self.query_pos = pos[:, -last:].clone()

    @property
    def observed(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The last queries [B, H, W, D] and their positions [B, W], or None."""
        return None if self.queries is None or self.query_pos is None else (self.queries, self.query_pos)

    def forget_queries(self, last: int) -> None:
        """Frees all but the last so many queries."""
        if self.queries is not None and self.query_pos is not None and self.queries.shape[2] > last:
            self.queries, self.query_pos = self.queries[:, :, -last:].clone(), self.query_pos[:, -last:].clone()

    def forget_observations(self) -> None:
        """Frees what only scoring needs, once no further cut will come."""
        self._mass = self.queries = self.query_pos = self.moments = None

    def replace(self, kept: Kept, room: int) -> None:
        """Puts the slots that stay, [B, K, M], in the place of all slots.

        Args:
            room: tokens that will be added before the next cut; the storage is sized for them. 0: none comes, and the
                first token that does makes its own room, when the prompt's forward with its activations is over.
        """
        assert self._keys is not None and self._values is not None and self._pos is not None
        length = kept.keys.shape[2]
        capacity = length + (max(room, MIN_HEADROOM) if room else 0)
        fits = capacity <= self._keys.shape[2] <= 2 * capacity and self._pos.shape[1] == kept.pos.shape[1]
        # As a projection made them, a head's keys lie far apart
        fits = fits and not self.lent and self._keys.is_contiguous()
        if not fits:
            shape = (*kept.keys.shape[:2], capacity)
            self._keys = kept.keys.new_empty(*shape, kept.keys.shape[3])
            self._values = kept.values.new_empty(*shape, kept.values.shape[3])
            self._pos = kept.pos.new_full((shape[0], kept.pos.shape[1], capacity), -1)
            self._mass = None if kept.mass is None else kept.mass.new_zeros(shape)
            self.lent = False
        self._keys[:, :, :length] = kept.keys
        self._values[:, :, :length] = kept.values
        self._pos[:, :, :length] = kept.pos
        if kept.mass is not None and self._mass is not None:
            self._mass[:, :, :length] = kept.mass
        if kept.bias is None:
            self._bias = None
        else:
            if self._bias is None or not fits:
                self._bias = kept.bias.new_zeros(self._keys.shape[:3])
            self._bias[:, :, :length] = kept.bias
        self.memory = kept.memory
        self.length, self.holes = length, False

    def make_room(self, new: int, held: int) -> None:
        """Closes the holes where so many new slots would not fit behind them; held: real pairs of the fullest row."""
        assert self._keys is not None
        if self.holes and self.length + new > self._keys.shape[2]:
            self.compact(held, room=new)

    def compact(self, length: int, room: int = 0, first: Sequence[int] | None = None) -> None:
        """Takes out what is empty, wherever it stands: each row and head has its last `length` pairs at the end.

        Args:
            length: pairs of the row and head that has most. room: tokens that will be added next.
            first: position of each row's first pair that stays; default all stay.
        """
        stays = self.pos >= 0
        if first is not None:
            stays &= self.pos >= to_device(first, self.pos.device).view(-1, 1, 1)
        index = stays.to(torch.uint8).argsort(dim=-1, stable=True)[..., self.length - length :]
        pos = self.pos.gather(2, index).masked_fill(~stays.gather(2, index), -1)
        mass, bias = (
            None if x is None else x.gather(2, index.expand(-1, x.shape[1], -1)) for x in (self.mass, self.bias)
        )
        keys, values = rows_of(self.keys, index), rows_of(self.values, index)
        self.replace(Kept(keys, values, pos, mass, bias, self.memory, index), room)

    def watch(self, queries: torch.Tensor) -> None:
        """Notes new queries [B, H, q, D], in a store that codes keys by what they are asked for."""

    def settle(self) -> None:
        """After a forward and its cut, where it is due: a store that holds old pairs in another form moves them."""

    def write_sinks(self, index: torch.Tensor, keys: torch.Tensor) -> None:
        """Puts keys [B, K, S, D] in the place of the first S pairs of each row, which are the slots at index."""
        self.keys.scatter_(2, index, keys)

    def drop_between(self, first: int, last: int) -> None:
        """Takes out the slots first .. last - 1; those after them move up."""
        for name in ("_keys", "_values", "_pos", "_mass", "_bias"):
            old = getattr(self, name)
            if old is not None:
                old[:, :, first : first + self.length - last] = old[:, :, last : self.length].clone()
        self.length -= last - first

    def select(self, rows: Sequence[int]) -> LayerStore:
        """A copy that holds the given batch rows (repeats allowed): everything that belongs to a row moves with it."""
        new = self._blank()
        new.length, new.holes = self.length, self.holes
        chosen = torch.tensor(rows)
        new.moments = None if self.moments is None else self.moments.select(chosen)
        for name in ("_keys", "_values", "_pos", "_mass", "_bias", "memory", "queries", "query_pos", "pristine_sinks"):
            old = getattr(self, name)
            if old is not None:
                setattr(new, name, old.index_select(0, chosen.to(old.device)))
        return new

    def _blank(self) -> LayerStore:
        return LayerStore()

    def _reallocate(self, capacity: int) -> None:
        for name in ("_keys", "_values", "_pos", "_mass", "_bias"):
            old = getattr(self, name)
            if old is not None:
                shape = list(old.shape)
                shape[2] = capacity
                new = old.new_zeros(shape) if name == "_mass" else old.new_empty(shape)
                new[:, :, : self.length] = old[:, :, : self.length]
                setattr(self, name, new)
        self.lent = False

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of keys and values of one slot of one KV head; 0 where nothing is known of them yet."""
        if self._keys is None or self._values is None:
            return 0
        return self._keys.shape[3] * self._keys.element_size() + self._values.shape[3] * self._values.element_size()

    def valid_bytes(self, held: Sequence[float]) -> list[float]:
        """Bytes of keys and values of each row, which holds so many slots per KV head: empty ones left out."""
        heads = 0 if self._keys is None else self._keys.shape[1]
        return [slots * heads * self.bytes_per_slot for slots in held]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the key and value storage, headroom and empty slots included."""
        held = (self._keys, self._values)
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    @property
    def overhead_bytes(self) -> int:
        """Bytes held beside keys and values: positions, accumulated attention, logit biases, last queries and moments
        of all, pristine sinks."""
        held = (self._pos, self._mass, self._bias, self.memory, self.queries, self.query_pos, self.pristine_sinks)
        moments = 0 if self.moments is None else self.moments.nbytes
        return sum(t.numel() * t.element_size() for t in held if t is not None) + moments

    @property
    def shared(self) -> Sequence[torch.Tensor]:
        """Tables [...] that other layers hold too."""
        return ()


def joined(stores: Sequence[LayerStore]) -> LayerStore:
    """The rows of all in one store, with empty slots before those that hold fewer; what only a further cut would ask
    for is there where all have it."""
    new, first = LayerStore(), stores[0]
    if len(stores) == 1:
        return first
    new.length, new.holes = max(store.length for store in stores), any(store.holes for store in stores)
    heads = max(store.pos.shape[1] for store in stores)

    def together(parts: Sequence[torch.Tensor], empty: float) -> torch.Tensor:
        """[B, K, N, ...] each."""
        after = [(0, 0) * (x.dim() - 3) + (new.length - x.shape[2], 0) for x in parts]
        return torch.cat([F.pad(x, pad, value=empty) for x, pad in zip(parts, after, strict=True)])

    new._keys, new._values = together([s.keys for s in stores], 0), together([s.values for s in stores], 0)
    new._pos = together([s.pos.expand(-1, heads, -1) for s in stores], -1)
    if all(s.mass is not None for s in stores):
        new._mass = together([s.mass for s in stores if s.mass is not None], 0)
    if any(s.bias is not None for s in stores):
        none = [s.keys.new_zeros(s.keys.shape[:3], dtype=torch.float32) for s in stores]
        new._bias = together([n if s.bias is None else s.bias for s, n in zip(stores, none, strict=True)], 0)
    for name in ("queries", "query_pos", "memory"):
        parts = [getattr(store, name) for store in stores]
        if len({None if x is None else x.shape[1:] for x in parts}) == 1 and parts[0] is not None:
            setattr(new, name, torch.cat(parts))
    if all(s.moments is not None for s in stores):
        new.moments = QueryMoments.joined([s.moments for s in stores if s.moments is not None])
    sinks = [store.pristine_sinks for store in stores]
    if any(x is not None for x in sinks):
        most = max(x.shape[2] for x in sinks if x is not None)
        own = [s.keys[:, :, :most] if x is None else x for s, x in zip(stores, sinks, strict=True)]
        new.pristine_sinks = torch.cat([F.pad(x, (0, 0, 0, most - x.shape[2])) for x in own])
    return new


def rows_of(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B, K, N, D] at index [B, 1 or K, M]: [B, K, M, D]. Whole rows: four times as fast as torch.gather on a CPU."""
    rows, heads = (torch.arange(n, device=index.device) for n in x.shape[:2])
    return x[rows.view(-1, 1, 1), heads.view(1, -1, 1), index.expand(-1, x.shape[1], -1)]


def _own_storage(x: torch.Tensor) -> torch.Tensor:
    """A view into a larger tensor (a fused projection) would keep all of it alive: copy those, adopt the others."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


def blank_lowest(scores: torch.Tensor, pos: torch.Tensor, drop: list[int]) -> None:
    """Empties the slots with the lowest scores, in place: pos becomes -1 there. Ties go to the older token, as in a cut
    that moves everything.

    Args:
        scores: [B, 1 or K, N]. pos: [B, 1 or K, N], as many heads as the scores or K.
        drop: slots per row that go, a few.
    """
    scores = at_least_float32(scores)
    finite = torch.finfo(scores.dtype)
    scores = torch.where(pos >= 0, scores.clamp(finite.min, finite.max), float("inf"))
    last, most = pos.shape[2] - 1, max(drop)
    todo = None if min(drop) == most else to_device(drop, pos.device).view(-1, 1, 1)
    for i in range(most):
        lowest = last - scores.flip(-1).argmin(-1, keepdim=True)  # of equal ones the newest
        if todo is None:
            pos.scatter_(2, lowest, -1)
        else:
            pos.scatter_(2, lowest, pos.gather(2, lowest).masked_fill(todo > i, -1))
        if i + 1 < most:
            scores.scatter_(2, lowest, float("inf"))

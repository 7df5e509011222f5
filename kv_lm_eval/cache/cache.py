"""CompressedCache: what transformers sees as the cache of a batch, whose rows never meet.

Rows that are fed alike share a `Segment`, a rectangle without padding; rows that are not, part. A forward is either one
rectangle, or all segments' tokens packed in one row [1, N] (engine/prefill.py), or the left-padded rectangle of a stock
generate(), of which the padding goes no further than here. What belongs to a row is a function of its own tokens, since
no segment ever sees another's.

Shapes: B batch rows, R rows of a segment, n new tokens of each, H heads, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kv_lm_eval.cache.attention import Step
from kv_lm_eval.cache.face import Face
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.hook import show_hidden
from kv_lm_eval.cache.segment import Mode, Segment, together
from kv_lm_eval.cache.view import AskedOfCompression


@dataclass(frozen=True)
class Fed:
    """A segment's share of a forward: n new tokens of each of its rows.

    Attributes:
        where: its tokens, row after row, among all [B * q] of the forward; None: they are all of them, in order.
    """

    segment: Segment
    tokens: int
    where: slice | torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Tokens of all its rows."""
        return self.segment.rows * self.tokens


class CompressedCache(Face):
    """The KV cache of one batch under one compression.

    Args:
        compression: the method with its budget, schedule and treatment of the evicted.
        facts: what the self-check found out about the model.
        segment: the kind of segments that serve the method.

    Attributes:
        segments: rows that were fed alike. members: the rows of the batch in each segment.
        around_cut: a context manager entered for each layer's cut, to measure it.
        prefill_chunk: tokens of a prompt in one forward, None: all (`engine/prefill.py` does it).
        prefill_evicts: whether the cache is cut between the chunks.
        keeps_history: whether the numbers after each step are kept: where rows go on after their end, as in a stock
            generate(), until the last one's.

    Raises:
        TypeError: the method needs another kind of segment; `make_cache` gives the right one.
    """

    def __init__(
        self,
        compression: AskedOfCompression,
        facts: ModelFacts,
        segment: Callable[[AskedOfCompression, ModelFacts], Segment] = Segment,
    ) -> None:
        super().__init__(facts)
        if compression.method.reads_hidden or compression.method.reads_effects:
            show_hidden(facts.modules.values())
        self._new_segment = partial(segment, compression, facts)
        self.around_cut: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.prefill_chunk: int | None = None
        self.prefill_evicts = False
        self.keeps_history = False
        self.reset()

    def reset(self) -> None:
        self.segments: list[Segment] = [self._new_segment()]
        self.members: list[list[int]] = [[]]
        self._announced: list[Fed] | None = None
        self._fed: list[Fed] | None = None  # of the running forward
        self._columns = 0  # tokens of the longest row, padding included

    def apart(self, caches: int) -> list[CompressedCache]:
        """So many caches of equally many rows, in order; no two of them share a segment."""
        if caches == 1:
            return [self]
        size, parts = self.batch // caches, list[CompressedCache]()
        for first in range(0, self.batch, size):
            part = copy.copy(self)
            Face.__init__(part, self.facts)
            own = [i for i, members in enumerate(self.members) if first <= members[0] < first + size]
            part.take([self.segments[i] for i in own], [[row - first for row in self.members[i]] for i in own])
            parts.append(part)
        return parts

    # ------------------------------------------------------------------------------------ rows

    @property
    def batch(self) -> int:
        """Rows."""
        return sum(map(len, self.members))

    def open(self, rows: int) -> None:
        """Makes room for a batch of so many rows, of which nothing has been fed yet."""
        if not self.batch:
            self.members = [list(range(rows))]
            self.segments[0].open(rows, self.around_cut, self.keeps_history)

    def hold(self, rows: Sequence[Segment | None]) -> None:
        """Takes over rows that were fed elsewhere, each a segment; None: one of which nothing has been fed."""
        segments = list[Segment]()
        for segment in rows:
            if segment is None:
                segment = self._new_segment()
                segment.open(1, self.around_cut, self.keeps_history)
            segment.around_cut = self.around_cut
            segments.append(segment)
        self.take(segments, [[row] for row in range(len(rows))])

    def take(self, segments: Sequence[Segment], members: Sequence[Sequence[int]]) -> None:
        """Takes over segments that were fed elsewhere, with the rows of the batch that each holds."""
        self.segments, self.members = list(segments), list(map(list, members))
        self._columns = max(map(max, (segment.seen for segment in self.segments)))

    def of_row(self, row: int) -> tuple[Segment, int]:
        """The segment that holds a row, and the row's number in it."""
        for segment, members in zip(self.segments, self.members, strict=True):
            if row in members:
                return segment, members.index(row)
        raise IndexError(f"row {row} of {self.batch}")

    def by_row(self, read: Callable[[Segment], Sequence[Any]]) -> list[Any]:
        """What each segment says of its rows, in the order of the batch."""
        found: dict[int, Any] = {}
        for segment, members in zip(self.segments, self.members, strict=True):
            found.update(zip(members, read(segment), strict=True))
        return [found[row] for row in sorted(found)]

    def part(self, keys: Sequence[Hashable]) -> None:
        """Splits every segment so that its rows have equal keys; keys: one for each row of the batch."""
        segments, members = list[Segment](), list[list[int]]()
        for segment, rows in zip(self.segments, self.members, strict=True):
            groups: dict[Hashable, list[int]] = {}
            for i, row in enumerate(rows):
                groups.setdefault(keys[row], []).append(i)
            segments += segment.split(list(groups.values()))
            members += [[rows[i] for i in group] for group in groups.values()]
        self.segments, self.members = segments, members

    def select(self, rows: Sequence[int]) -> CompressedCache:
        """A copy with the given rows (repeats allowed): the fork from which several continuations go on."""
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        Face.__init__(new, self.facts)
        new.segments, new.members = [], []
        for segment, members in zip(self.segments, self.members, strict=True):
            place = {row: i for i, row in enumerate(members)}
            if chosen := [i for i, row in enumerate(rows) if row in place]:
                new.segments.append(segment.select([place[rows[i]] for i in chosen]))
                new.members.append(chosen)
        return new

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows at the indices [B], in their place."""
        new = self.select(beam_idx.tolist())
        self.segments, self.members = new.segments, new.members

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.batch).repeat_interleave(repeats))

    def keep_history(self, keeps: bool) -> None:
        """Whether the numbers after each step are kept from here on."""
        self.keeps_history = keeps
        self.set(keeps_history=keeps)

    def gather(self) -> None:
        """Joins the segments that may go on as one rectangle, as prompts of any lengths may after their cut."""
        groups: dict[Hashable, list[int]] = {}
        for i, segment in enumerate(self.segments):
            groups.setdefault(segment.joins or i, []).append(i)
        self._join(list(groups.values()))

    def join(self) -> Segment:
        """All rows in one segment, in order, with empty slots before those of rows that hold fewer."""
        self._join([list(range(len(self.segments)))])
        return self.segments[0]

    def _join(self, groups: Sequence[Sequence[int]]) -> None:
        segments, members = list[Segment](), list[list[int]]()
        for group in groups:
            rows = [row for i in group for row in self.members[i]]
            whole, order = Segment.joined([self.segments[i] for i in group]), sorted(rows)
            segments.append(whole if rows == order else whole.select([rows.index(row) for row in order]))
            members.append(order)
        self.segments, self.members = segments, members

    def close(self, rows: Sequence[int]) -> None:
        """Frees what these rows hold: they have ended, and only their numbers are asked for from now on."""
        gone = set(rows)
        self.part([row in gone for row in range(self.batch)])
        for segment, members in zip(self.segments, self.members, strict=True):
            if members[0] in gone:
                segment.close()

    # ------------------------------------------------------------------------------------ one forward

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
        if layer_idx == 0:
            self._fed = None
        return super().update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by the longest row, padding included: never the number of slots."""
        return self._columns

    def announce(self, counts: Sequence[int]) -> list[tuple[Segment, list[int]]]:
        """Says what the next forward feeds: each row's number of tokens. Rows of a segment that are not fed alike part.

        Returns:
            the segments that are fed, with their rows, as their tokens stand in the forward: all rows of the first,
            then all of the second, packed in one row [1, N]; those of a single segment as they are, [R, n].
        """
        self.open(len(counts))
        self.part(counts)
        pairs = zip(self.segments, self.members, strict=True)
        fed = [(segment, rows) for segment, rows in pairs if rows and counts[rows[0]]]
        self._announced, at = [], 0
        for segment, rows in fed:
            end = at + len(rows) * counts[rows[0]]
            self._announced.append(Fed(segment, counts[rows[0]], slice(at, end) if len(fed) > 1 else None))
            at = end
        return fed

    def attend(self, step: Step, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of one layer's new tokens, [B, q, H, D]: each segment's over its own slots; 0 for padding."""
        if self._fed is None:
            self._fed, self._announced = self._announced or self._by_mask(mask, *step.pos.shape), None
            self._columns += max((fed.tokens for fed in self._fed if not fed.segment.reads_only), default=0)
            for fed in self._fed:
                own = step.pos if fed.where is None else step.pos.reshape(-1)[fed.where]
                fed.segment.begin(own.reshape(-1, fed.tokens))
        if self._fed[0].where is None:
            segment = self._fed[0].segment
            return segment.attend(step._replace(pos=segment.new_pos)).transpose(1, 2).contiguous()
        tokens = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (step.query, step.key, step.value))
        hidden: list[torch.Tensor | None] = [None] * len(self._fed)
        if step.hidden is not None:
            hidden = [x.squeeze(1) for x in self._shares(step.hidden.reshape(-1, 1, step.hidden.shape[-1]))]
        outs = [
            fed.segment.attend(step._replace(query=q, key=k, value=v, pos=fed.segment.new_pos, hidden=x))
            .transpose(1, 2)
            .flatten(0, 1)
            for fed, q, k, v, x in zip(self._fed, *map(self._shares, tokens), hidden, strict=True)
        ]
        if isinstance(self._fed[0].where, slice):
            whole = torch.cat(outs)
        else:
            whole = outs[0].new_zeros(step.pos.numel(), *outs[0].shape[1:])
            for fed, out in zip(self._fed, outs, strict=True):
                whole[fed.where] = out
        return whole.view(*step.pos.shape, *whole.shape[1:])

    def _shares(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Of x [B * q, heads, D] each segment's own, [R, heads, n, D]."""
        assert self._fed is not None
        packed = isinstance(self._fed[0].where, slice)
        own = x.split([fed.size for fed in self._fed]) if packed else [x[fed.where] for fed in self._fed]
        for fed, part in zip(self._fed, own, strict=True):
            yield part.view(fed.segment.rows, fed.tokens, *x.shape[1:]).transpose(1, 2)

    def _by_mask(self, mask: torch.Tensor | None, batch: int, q: int) -> list[Fed]:
        """The shares of a rectangle [B, q] of which the mask [B, >= q] leaves out the padding."""
        if mask is None or q == 1:  # a single token of every row: no need to ask the device
            real, counts = None, [q] * batch
        else:
            real = mask[:, -q:].bool()
            counts = real.sum(1).tolist()
        fed = self.announce(counts)
        if len(fed) == 1 and counts == [q] * batch and fed[0][1] == list(range(batch)):
            return [Fed(fed[0][0], q)]
        device = None if mask is None else mask.device
        places = torch.arange(batch * q, device=device).view(batch, q)
        shares = []
        for segment, rows in fed:
            own = places[rows] if real is None else places[rows][real[rows]]
            shares.append(Fed(segment, counts[rows[0]], own.flatten()))
        return shares

    def advance(self) -> None:
        """A forward of one token a row went by without this cache's attention."""
        self._columns += 1

    # ------------------------------------------------------------------------------------ what the engine asks and says

    @property
    def compression(self) -> AskedOfCompression:
        return self.segments[0].compression

    @property
    def mode(self) -> Mode:
        """What the next forward is, see `Segment`."""
        return self.segments[0].mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self.set(mode=mode)

    def set(self, **state: Any) -> None:
        """Sets attributes of all segments: `mode`, `compression`, `decoded`."""
        for segment in self.segments:
            for name, value in state.items():
                setattr(segment, name, value)

    @property
    def seen(self) -> list[int]:
        """Tokens fed, by row."""
        return self.by_row(lambda segment: segment.seen)

    def until_due(self, left: Sequence[int]) -> list[int]:
        """How many tokens each row is fed next, of which so many are left: until its next cut, or where the next pairs
        are quantised. Rows that have none left part from the others."""
        self.open(len(left))
        self.part([n > 0 for n in left])
        steps = list(left)
        for segment, rows in zip(self.segments, self.members, strict=True):
            due = {n: segment.until_due(n) for n in {left[row] for row in rows} if n}  # where a row ends matters to it
            for row in rows:
                steps[row] = min(left[row], due.get(left[row], 0))
        return steps

    def widest(self, counts: Sequence[int]) -> list[int]:
        """For each row, the largest of the numbers of its segment's rows."""
        found = [0] * len(counts)
        for rows in self.members:
            most = max(counts[row] for row in rows)
            for row in rows:
                found[row] = most
        return found

    def read_only(self, branches: Sequence[Sequence[int]]) -> None:
        """The next forward is read only; its new tokens see each other within a branch, [tokens] by row."""
        for segment, rows in zip(self.segments, self.members, strict=True):
            segment.mode, segment.branch = "score", torch.tensor([branches[row] for row in rows])

    # ------------------------------------------------------------------------------------ numbers

    @property
    def stores(self) -> list[Any]:
        """The stores of a batch that is one segment, by layer; of several, a picture of keys, values and positions with
        empty slots before those of rows that hold fewer."""
        return self.segments[0].stores if len(self.segments) == 1 else self.select(range(self.batch)).join().stores

    @property
    def held(self) -> list[list[float]]:
        """Slots in use by layer and row."""
        return [self.by_row(lambda segment, i=i: segment.held[i]) for i in range(self.facts.num_layers)]  # type: ignore[misc]

    @property
    def peaks(self) -> list[float]:
        """Most slots that any layer that may be cut ever held, by row."""
        return self.by_row(lambda segment: segment.peaks)

    @property
    def prefill_end(self) -> dict[str, Any] | None:
        """The snapshot at the end of the prefill, None where there was none; rows that had none are as they are now,
        not compressed."""
        if all(segment.prefill_end is None for segment in self.segments):
            return None
        return self._together([segment.prefill_end or segment.uncut() for segment in self.segments])

    def count_only(self, prefilled: Sequence[int], contexts: Sequence[int]) -> None:
        """Lets the numbers speak of contexts of so many tokens: a continuation scored in the same forward is not
        kept."""
        for segment, rows in zip(self.segments, self.members, strict=True):
            segment.count_only([prefilled[i] for i in rows], [contexts[i] for i in rows])

    def snapshot(self, decode_steps: Sequence[int] | None = None) -> dict[str, Any]:
        """Sizes of each row now, or after its own number of decode steps. Bytes are of keys and values.

        They are of the whole model, of which tensor parallelism gives this process a share. `valid` leaves out empty
        slots; `allocated` is the storage as it is now, shared evenly by the rows of the batch.
        """
        return self._together(
            [
                segment.snapshot(None if decode_steps is None else [decode_steps[i] for i in rows])
                for segment, rows in zip(self.segments, self.members, strict=True)
            ]
        )

    def _together(self, snapshots: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Those of the segments as one of the batch, in its order."""
        whole, order = together(snapshots, list(map(len, self.members))), [row for rows in self.members for row in rows]
        places = [order.index(row) for row in range(len(order))]
        return {k: [v[i] for i in places] if isinstance(v, list) else v for k, v in whole.items()}


def side_by_side(caches: Sequence[CompressedCache]) -> CompressedCache:
    """The rows of several caches, each under its own compression, one cache's after the other's, so that they go on in
    the same forwards. `apart` gives the caches back; meanwhile they are of no use."""
    if len(caches) == 1:
        return caches[0]
    whole, before = copy.copy(caches[0]), 0
    Face.__init__(whole, caches[0].facts)
    segments, members = list[Segment](), list[list[int]]()
    for cache in caches:
        segments += cache.segments
        members += [[before + row for row in rows] for rows in cache.members]
        before += cache.batch
    whole.take(segments, members)
    return whole

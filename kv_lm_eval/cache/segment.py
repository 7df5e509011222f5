"""Segment: rows of a batch that are fed alike, a rectangle without padding; where compression happens.

One layer of a forward is `attend`: the new pairs are stored, every query attends over what it may see, what scores will
want to know is noted, and the layer is cut before the next one runs: during a prefill at most one layer is whole.

Shapes: B rows of the segment, H query heads, K KV heads, N slots, M slots kept, q new tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import ceil
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from kv_lm_eval.cache.attention import Step, Visible, attend, window_attention, window_logits
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.moments import QueryMoments
from kv_lm_eval.cache.output import output_norms
from kv_lm_eval.cache.quantized import QuantizedStore
from kv_lm_eval.cache.received import attend_counted, received_mass
from kv_lm_eval.cache.reread import effects, strongest_attention
from kv_lm_eval.cache.store import LayerStore, blank_lowest, joined
from kv_lm_eval.cache.transfer import at_least_float32, sum_dtype, to_device
from kv_lm_eval.cache.view import AskedOfCompression, View
from kv_lm_eval.errors import UserError

FEW = 4  # pairs that one cut may hide in their places instead of moving the others
MAX_ROOM = 1024  # slots reserved for the tokens until the next cut, at most; storage grows by itself
TRIM_EVERY = 64  # tokens a row sees until its sliding-window layers that are never cut drop what they cannot see
ALL = 2**31 - 1  # queries: more than there are
MOMENTS_BLOCK = 1024  # queries turned back in float32 at a time
Mode = Literal["prefill", "decode", "hold", "score", "again"]
Numbers = tuple[list[float], float, float]  # of a row: slots held by layer, peak, valid bytes


class Segment:
    """Rows of a batch that were fed as many tokens as each other at every forward, under one compression.

    Args:
        compression: the method with its budget, schedule and treatment of the evicted.
        facts: what the self-check found out about the model.

    Attributes:
        mode: what the next forward is.
            "prefill": the end of the prompts, cut after it; becomes "decode" by itself at the next forward;
            "decode": tokens after the prefill, cut when the schedule says so;
            "hold": stored and not cut;
            "score": read only, nothing is stored (`branch` says which new tokens see each other);
            "again": the same for tokens that are read a second time, whose attention to `part` of the slots is noted.
        rows: their number. seen: tokens fed, by row. held: slots in use per row, by layer. peaks: most slots that any
            layer of the row that may be cut ever held.
        texts: tokens that each row was fed, and read_again: how many of them were read again, for methods that do so.
        part: the slots whose tokens are being read again, from the first of the two to the second, from the last on.
        waiting: layers of the last forward that will be cut together.
        decoded: the schedule's clock, tokens fed since the end of the prefill. prefill_end, end: the numbers at the end
            of the prefill, and of rows that have ended.
        around_cut: a context manager entered for each layer's cut, to measure it.
        history: each row's numbers after the prefill and after each decode step, where `keeps_history`.
        serves: what a kind of segment can do beyond dropping pairs, by the method's name for it.
        may_join: whether all that belongs to a row of this kind is known here, so that segments can be joined.

    Raises:
        TypeError: the method needs another kind of segment; `make_cache` gives the right one.
    """

    serves: ClassVar[tuple[str, ...]] = ()
    may_join: ClassVar[bool] = True

    def __init__(self, compression: AskedOfCompression, facts: ModelFacts) -> None:
        for needed in ("ring", "reinserted", "pages"):
            if getattr(compression.method, needed) and needed not in self.serves:
                raise TypeError(
                    f"{type(self).__name__} cannot serve a method with {needed}={getattr(compression.method, needed)}: "
                    "it would be measured under another cache's name; make_cache gives the right class"
                )
        self.compression = compression
        self.facts = facts
        self.mode: Mode = "prefill"
        self.stores = [self._new_store(i) for i in range(facts.num_layers)]
        self.prefill_end: dict[str, Any] | None = None
        self.end: dict[str, Any] | None = None
        self.history: list[list[Numbers]] = []
        self.decoded = 0
        self.waiting: list[Step] = []
        self._undefined: dict[int, torch.Tensor] = {}  # of each layer cut in this forward: whether a score is NaN
        self.branch: torch.Tensor | None = None
        self.part = 0, 0
        self._last_votes: torch.Tensor | None = None  # what the slots of the last layer received of a single new token
        self.open(0, nullcontext)

    def open(
        self, rows: int, around_cut: Callable[[], AbstractContextManager[Any]], keeps_history: bool = False
    ) -> None:
        """So many rows, of which nothing has been fed."""
        self.around_cut, self.keeps_history = around_cut, keeps_history
        self.seen = [0] * rows
        self.peaks: list[float] = [0] * rows
        self.held: list[list[float]] = [[0] * rows for _ in self.stores]
        self.texts, self.read_again = list[list[int]]([] for _ in range(rows)), [0] * rows

    def _new_store(self, layer: int) -> LayerStore:
        storage = self.compression.storage
        if not storage.quantises:
            return LayerStore()
        return QuantizedStore(storage, self.compression.method.in_cache_sinks if self.facts.compressible(layer) else 0)

    # ------------------------------------------------------------------------------------ rows

    @property
    def rows(self) -> int:
        return len(self.seen)

    def select(self, rows: Sequence[int]) -> Segment:
        """A copy with the given rows (repeats allowed): everything that belongs to a row moves with it."""
        new = self._counts_of(rows)
        new.stores = [store.select(rows) for store in self.stores]
        return new

    def split(self, groups: Sequence[Sequence[int]]) -> list[Segment]:
        """The same rows in a segment for each group; this one is of no use afterwards."""
        if len(groups) == 1:
            return [self]
        parts = [self._counts_of(group) for group in groups]
        for i, store in enumerate(self.stores):  # layer by layer, so that no more than one is there twice
            for part, group in zip(parts, groups, strict=True):
                part.stores.append(store.select(group))
            self.stores[i] = self._new_store(i)
        return parts

    def _counts_of(self, rows: Sequence[int]) -> Segment:
        """A copy with the given rows and no stores yet."""
        new = copy.copy(self)
        new.stores, new.waiting = [], list(self.waiting)
        new.seen, new.peaks = [self.seen[i] for i in rows], [self.peaks[i] for i in rows]
        new.held = [[held[i] for i in rows] for held in self.held]
        for name in ("prefill_end", "end"):
            if (numbers := getattr(self, name)) is not None:
                own = {k: [v[i] for i in rows] if isinstance(v, list) else v for k, v in numbers.items()}
                setattr(new, name, own)
        new.history = [[step[i] for i in rows] for step in self.history]
        new.texts, new.read_again = [list(self.texts[i]) for i in rows], [self.read_again[i] for i in rows]
        return new

    @property
    def joins(self) -> Hashable:
        """Equal for segments whose rows may go on as one rectangle, None where they may not.

        They hold equally many slots everywhere. Where no cut will come, it is enough that their heads hold unequally
        many, so that there is a mask anyway; and on a GPU, which launches kernels for every segment, nothing is asked.
        """
        if not self.may_join or self.compression.storage.quantises or self.end is not None:
            return None
        last = not (self.compression.schedule.online and self.compression.method.compresses)
        uneven = not all(map(self._even, range(len(self.stores))))
        if last and (uneven or self.stores[0].keys.device.type == "cuda"):
            return id(self.compression), "after the last cut"
        return (
            id(self.compression),
            self.mode,
            self.decoded,
            self.prefill_end is None,
            *(store.shape for store in self.stores),
        )

    @staticmethod
    def joined(segments: Sequence[Segment]) -> Segment:
        """The rows of all in one rectangle; empty slots come first in rows that hold fewer."""
        new = copy.copy(segments[0])
        new.seen = [n for s in segments for n in s.seen]
        new.peaks = [n for s in segments for n in s.peaks]
        new.held = [[n for s in segments for n in s.held[i]] for i in range(len(new.stores))]
        new.texts = [text for s in segments for text in s.texts]
        new.read_again = [n for s in segments for n in s.read_again]
        new.stores = [joined([s.stores[i] for s in segments]) for i in range(len(new.stores))]
        histories = zip(*(s.history for s in segments), strict=False)
        new.history = [[row for step in steps for row in step] for steps in histories]
        if any(s.prefill_end is not None for s in segments):
            new.prefill_end = together([s.prefill_end or s.uncut() for s in segments], [s.rows for s in segments])
        return new

    def uncut(self) -> dict[str, Any]:
        """The numbers of rows that have no prefill."""
        return {**self.snapshot(), "compressed": [False] * self.rows}

    def close(self) -> None:
        """Lets go of what the rows hold, and keeps their numbers."""
        if self.end is None:
            self.end = self.snapshot()
            self.stores = [self._new_store(i) for i in range(len(self.stores))]

    # ------------------------------------------------------------------------------------ one forward

    def prepare(self, tokens: int) -> None:
        """Before the positions of so many new tokens are asked for."""

    def next_positions(self) -> list[int]:
        """Position of each row's next token, as the model is told."""
        return self.seen

    def begin(self, pos: torch.Tensor) -> None:
        """Called before the first layer: notes the places [B, q] of the new tokens."""
        if self.waiting and self.mode != "again":
            raise UserError(
                f"method={self.compression.method.name} reads tokens a second time before a cut, and this forward "
                "comes without it: feed the model through kv_lm_eval, or take a method that reads once, such as snapkv"
            )
        if self.mode == "prefill" and self.prefill_end is not None:
            self.mode = "decode"
        self.new_pos = pos
        if not self.reads_only:
            self.seen = [n + pos.shape[1] for n in self.seen]

    @property
    def reads_only(self) -> bool:
        """Whether the next forward stores nothing."""
        return self.mode in ("score", "again")

    def attend(self, step: Step) -> torch.Tensor:
        """One layer's attention, [B, H, q, D]: the new pairs are stored before it and the layer is cut after it."""
        if self.per_query_head(step.layer):
            group = step.query.shape[1] // step.key.shape[1]
            key, value = (x.repeat_interleave(group, dim=1) for x in (step.key, step.value))
            step = step._replace(key=key, value=value)
        if step.pos.device != step.query.device:
            step = step._replace(pos=step.pos.to(step.query.device))
        seen = self._with_stored(step) if self.reads_only else self._stored(step)
        method, observes = self.compression.method, self._observes(step.layer)
        mass = None
        if observes and (method.accumulates or (method.num_queries == 1 == step.tokens and step.softcap is None)):
            out, mass = attend_counted(step, seen)
        else:
            out = self._attention(step, seen)
        if observes:
            self._observe(step, mass)
        if self.mode == "again" and self._is_cut(step.layer):
            far, near = self.part
            part = slice(seen.old - far, seen.old - near)
            effect = effects(self.facts, step.layer, seen.values[:, :, part]) if method.reads_effects else None
            attention = strongest_attention(step, seen, part, method.reread_sinks, effect)
            self.stores[step.layer].note_mass(part.start, attention)
        self._after_attention(step)
        return out

    def _attention(self, step: Step, seen: Visible) -> torch.Tensor:
        """[B, H, q, D] of the new tokens over what they see."""
        return attend(step, seen)

    def _stored(self, step: Step) -> Visible:
        """Puts the new pairs behind the layer's others; what the step attends over."""
        layer, store = step.layer, self.stores[step.layer]
        if store.holes:
            store.make_room(step.tokens, int(max(self.held[layer])))
        old = 0 if store.is_empty else store.length
        gaps = self.has_empty(layer)
        store.append(step.key, step.value, step.pos)
        self._count_new(step)
        return self._visible(step, (store.keys, store.values, store.pos), old, gaps, store.bias)

    def _count_new(self, step: Step) -> None:
        layer = step.layer
        self.held[layer] = [n + step.tokens for n in self.held[layer]]
        if self.facts.compressible(layer):
            self.peaks = [max(p, h) for p, h in zip(self.peaks, self.held[layer], strict=True)]

    def follow(self, step: Step, store: LayerStore, old: int) -> None:
        """One layer of a prompt whose attention is known, since nothing has been cut so far: all slots are borrowed,
        noted, and cut after the last of them.

        Args:
            store: the layer with the step's pairs in it, to which nobody writes. old: slots of it before the step.
        """
        layer, mine, copies = step.layer, self.stores[step.layer], 1
        if self.per_query_head(layer):
            copies = step.query.shape[1] // step.key.shape[1]
        mine.borrow(store, copies)
        self._count_new(step)
        if (most := int(max(self.held[layer]))) < mine.length:  # what its own window no longer shows has gone before
            mine.compact(most, first=[seen - most for seen in self.seen])
        if self._observes(layer):
            step = step._replace(key=mine.keys[:, :, old:], value=mine.values[:, :, old:])
            seen = self._visible(step, (mine.keys, mine.values, mine.pos), old, False, None)
            self._observe(step, received_mass(step, seen) if self.compression.method.accumulates else None)
        self._after_attention(step)

    def _with_stored(self, step: Step) -> Visible:
        """What is there and the new pairs, which are not stored."""
        layer, store, q = step.layer, self.stores[step.layer], step.tokens
        new_pos = step.pos.unsqueeze(1).to(torch.int32)
        branch = None if self.branch is None else self.branch.to(step.pos.device)
        keys, values = torch.cat([store.keys, step.key], dim=2), torch.cat([store.values, step.value], dim=2)
        pos = torch.cat([store.pos, new_pos.expand(-1, store.pos.shape[1], -1)], dim=2)
        bias = None if store.bias is None else F.pad(store.bias, (0, q))
        return self._visible(step, (keys, values, pos), store.length, self.has_empty(layer), bias, branch)

    def _visible(
        self,
        step: Step,
        slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        old: int,
        gaps: bool,
        bias: torch.Tensor | None,
        branch: torch.Tensor | None = None,
    ) -> Visible:
        """What the step attends over: keys, values and positions of the slots, and all that narrows the view."""
        sight = self.compression.sight(step.layer) if self.facts.compressible(step.layer) else None
        whole, reach = not gaps and bias is None and branch is None and sight is None, None
        if step.window is not None and max(self.seen) + (step.tokens if self.reads_only else 0) > step.window:
            whole, reach = whole and self._in_a_row(step.layer), step.window
        return Visible(*slots, old, whole, bias, branch, sight, reach)

    def _in_a_row(self, layer: int) -> bool:
        """Whether the layer's slots hold tokens that follow each other, so that its window is one of slots too."""
        return not self._is_cut(layer) or all(h >= n for h, n in zip(self.held[layer], self.seen, strict=True))

    def _observe(self, step: Step, mass: torch.Tensor | None) -> None:
        """Notes what scores will ask for: the last queries, the attention that each slot received, query moments."""
        store, method = self.stores[step.layer], self.compression.method
        if method.num_queries:
            store.observe(step.query, step.pos, ALL if method.every_query else method.num_queries)
        if method.accumulates and mass is not None:
            store.add_mass(mass)
        self._last_votes = mass if step.tokens == 1 else None
        if method.moments_from is not None:
            self.add_moments(step.layer, step.query, step.pos)
        if method.reads_hidden:
            self._note(step)

    def _note(self, step: Step) -> None:
        """Holds what the method says of the new tokens with their slots."""
        store, method = self.stores[step.layer], self.compression.method
        assert step.hidden is not None, "hook.show_hidden was not called"
        view = dataclasses.replace(self._view(step, self.held[step.layer]), _hidden=step.hidden)
        numbers = method.note(view)
        expected = (*step.key.shape[:2], step.tokens)
        if numbers.shape != expected:
            raise UserError(
                f"method={method.name} noted numbers of shape {list(numbers.shape)}: {expected[0]} rows, {expected[1]} "
                f"KV heads and {expected[2]} new tokens make {list(expected)}"
            )
        store.note_mass(store.length - step.tokens, at_least_float32(numbers))

    def _observes(self, layer: int) -> bool:
        """Whether the running forward's queries may matter to a later cut of the layer."""
        if not self.compression.method.compresses or self.reads_only or not self.facts.compressible(layer):
            return False
        return self.mode in ("prefill", "hold") or self.compression.schedule.online

    def _even(self, layer: int) -> bool:
        """Whether all heads of a row hold as many pairs: not where they share a budget, nor where what each of them
        chose has partly left the layer's own window."""
        return self.compression.uniform(layer) and not self._loses_sight(layer)

    def _loses_sight(self, layer: int) -> bool:
        """Whether cuts of the layer leave out what its own window no longer shows: where scores choose. What is kept by
        position alone is what the settings say, seen or not."""
        by_score = self.compression.method.sinks_and_recent is None
        return by_score and self.facts.sliding_windows[layer] is not None and self._is_cut(layer)

    def _most(self, layer: int) -> int | None:
        """Pairs that a cut of the layer can leave, where its own window shows no more; else None."""
        window = self.facts.sliding_windows[layer]
        return window - 1 if window is not None and self._loses_sight(layer) else None

    def has_empty(self, layer: int) -> bool:
        """Whether any row or head of the layer has empty slots, so that a mask is needed."""
        store = self.stores[layer]
        return not store.is_empty and min(self.held[layer]) < store.length

    def per_query_head(self, layer: int) -> bool:
        """Whether the layer holds keys and values for every query head, as methods ask that choose for each."""
        return self.compression.method.per_query_head and self.facts.compressible(layer)

    def add_moments(self, layer: int, query: torch.Tensor, pos: torch.Tensor) -> None:
        """Adds queries [B, H, q, D] at positions [B, q] to the layer's moments, turned back to 0."""
        store, first = self.stores[layer], self.compression.method.moments_from
        if store.moments is None:
            store.moments = QueryMoments.none_yet(query)
        for block, at in zip(query.split(MOMENTS_BLOCK, dim=2), pos.split(MOMENTS_BLOCK, dim=1), strict=True):
            store.moments.add(self._rotate(layer, at_least_float32(block), -at), at >= first)

    def _rotate(self, layer: int, x: torch.Tensor, delta: torch.Tensor, over: int = 1) -> torch.Tensor:
        """See `RopeKit.rotate`; what the model does not rotate stays as it is."""
        assert self.facts.rope is not None
        if not self.facts.rotates(layer):
            return x
        return self.facts.rope.rotate(x, delta, layer, over)

    def _after_attention(self, step: Step) -> None:
        """Cuts the layer if this forward is the end of the prefill or the schedule says so; it waits for the last one
        where all are cut together."""
        if not self.reads_only:
            self.stores[step.layer].watch(step.query)
        if self._is_cut(step.layer) and self.compression.waits and self._due(step.layer, step.tokens):
            self.waiting.append(_without_tensors(step))
        else:
            if self._is_cut(step.layer):
                self._cut_if_due(step)
            elif not self.reads_only:
                self._trim_sliding(step.layer, step.tokens)
            self._leave(step.layer, step.tokens)
        if step.layer == len(self.stores) - 1 and not self.unfinished:
            self.end_forward(step.tokens)

    @property
    def unfinished(self) -> bool:
        """Whether a cut waits for tokens to be read again, after which `end_forward` makes it."""
        return bool(self.waiting) and self.compression.method.reads_again

    @property
    def asks_again(self) -> bool:
        """Whether that cut will take anything, so that they must be."""
        return (self.compression.open and not self.compression.ranks_layers) or any(
            self._first_in_sight(step.layer) or self._keep(step.layer, step.tokens) != self.held[step.layer]
            for step in self.waiting
        )

    def end_forward(self, q: int) -> None:
        """After the last layer of a forward of q tokens: the cut of those that wait for it, and the numbers."""
        if self.waiting:
            waiting, self.waiting = self.waiting, []
            if self.compression.ranks_layers:
                self._cut_together(waiting)
            else:
                for step in waiting:
                    self._cut_if_due(step)
            for step in waiting:
                self._leave(step.layer, q)
        self._refuse_undefined()
        if self.mode == "decode":
            self.decoded += q
        if self.mode in ("prefill", "decode") and self.keeps_history:
            self.note()
        if self.mode == "prefill":
            self.prefill_end = self.snapshot()

    def _refuse_undefined(self) -> None:
        """Ends with the layers whose scores hold NaN, asked of all at once: a GPU is waited for a single time."""
        found, self._undefined = self._undefined, {}
        if not found:
            return
        device = next(iter(found.values())).device
        said = torch.stack([flag.to(device) for flag in found.values()]).tolist()
        if any(said):
            layer = list(found)[said.index(True)]
            raise UserError(
                f"method={self.compression.method.name} scored a token NaN in layer {layer}, so that which tokens stay "
                "would be chance"
            )

    def _leave(self, layer: int, q: int) -> None:
        """After a layer's forward and its cut: frees what only a further one would ask for, quantises what is due."""
        if self.mode == "prefill" and not self.compression.schedule.online:
            self.stores[layer].forget_observations()
        if self.compression.storage.quantises and self._settles(q):
            self.stores[layer].settle()

    def note(self) -> None:
        """Adds each row's numbers to the history."""
        self.history.append(
            list(zip(map(list, zip(*self.held, strict=True)), self.peaks, self._valid_bytes(), strict=True))
        )

    def _settles(self, q: int) -> bool:
        """Whether pairs change their form after this forward: at the end of the prompt, then as their tokens age."""
        if self.mode == "prefill":
            return self.compression.storage.due(0, self.seen[0])
        return self.mode == "decode" and self.compression.storage.due(self.seen[0] - q, self.seen[0])

    def _valid_bytes(self) -> list[float]:
        by_layer = [store.valid_bytes(held) for store, held in zip(self.stores, self.held, strict=True)]
        return [sum(row) * self.facts.ranks for row in zip(*by_layer, strict=True)]

    def _shared_bytes(self) -> int:
        """Bytes of the tables that layers share, such as the codebook of a storage: they are there once."""
        shared = {t.data_ptr(): t.numel() * t.element_size() for store in self.stores for t in store.shared}
        return sum(shared.values())

    def _trim_sliding(self, layer: int, q: int) -> None:
        """Drops what a layer of the model's own sliding window, which is never cut, can never see again.

        Each time a row has seen a multiple of TRIM_EVERY tokens: a clock of its own, whatever forwards they came in.
        """
        window = self.facts.sliding_windows[layer]
        if window is None:
            return
        first = [max(0, n // TRIM_EVERY * TRIM_EVERY - (window - 1)) for n in self.seen]
        if any(f and n // TRIM_EVERY > (n - q) // TRIM_EVERY for f, n in zip(first, self.seen, strict=True)):
            self.held[layer] = [n - f for n, f in zip(self.seen, first, strict=True)]
            self.stores[layer].compact(int(max(self.held[layer])), first=first)

    def _cut_if_due(self, step: Step) -> None:
        """Cuts the layer to its budget if this forward ends with a cut; what its own window no longer shows goes first:
        it may vote, it is neither counted nor chosen."""
        layer, store, q = step.layer, self.stores[step.layer], step.tokens
        due = self._due(layer, q) if self.compression.open or self._most(layer) is not None else True
        in_sight = self._in_sight(layer) if due else None
        keep = self._keep(layer, q)
        if keep != self.held[layer] or (due and self.compression.open):
            with self.around_cut():
                self._cut(step, keep, in_sight)
        elif in_sight is not None:
            store.compact(int(in_sight.sum(-1).max()), first=self._first_in_sight(layer))

    def _first_in_sight(self, layer: int) -> list[int] | None:
        """First token of each row that the layer's own window still shows; None: all are, or need not be."""
        most = self._most(layer)
        first = None if most is None else [max(0, n - most) for n in self.seen]
        return first if first is not None and any(first) else None

    def _in_sight(self, layer: int) -> torch.Tensor | None:
        """Slots that a cut of the layer may leave, [B, 1 or K, N], which alone are held from now on; None: all."""
        if (first := self._first_in_sight(layer)) is None:
            return None
        pos = self.stores[layer].pos
        in_sight = (pos >= 0) & (pos >= to_device(first, pos.device).view(-1, 1, 1))
        self.held[layer] = _counted(in_sight)
        return in_sight

    def _cut_together(self, waiting: Sequence[Step]) -> None:
        """Cuts the layers that have waited for the last one, which share their slots."""
        in_sight, keep = {step.layer: self._in_sight(step.layer) for step in waiting}, self.compression.mean(self.seen)
        if all(h <= k for step in waiting for h, k in zip(self.held[step.layer], keep, strict=True)) and not any(
            shown is not None for shown in in_sight.values()
        ):
            return
        with self.around_cut():
            views, scores = list[View](), list[torch.Tensor]()
            for step in waiting:
                view, score = self._scored(step, keep, in_sight[step.layer])
                views.append(view)
                scores.append(score)
            counts = self.compression.counts_of_layers(scores, [view.pos for view in views], self.seen)
            for step, view, score, count in zip(waiting, views, scores, counts, strict=True):
                self._close_ranks(step.layer, view, score, count)

    def _is_cut(self, layer: int) -> bool:
        """Whether the method ever cuts the layer."""
        skipped = layer in self.compression.schedule.skip_layers
        return self.compression.method.compresses and self.facts.compressible(layer) and not skipped

    def _due(self, layer: int, q: int) -> bool:
        """Whether a cut of the layer comes after the running forward, even if it holds too little for it."""
        schedule = self.compression.schedule
        if self.mode != "decode" or not schedule.online:
            return self.mode == "prefill"
        if schedule.trigger == "clock":
            return schedule.due(self.decoded, self.decoded + q)
        return self._keep(layer, q) != self.held[layer]

    def _keep(self, layer: int, q: int) -> list[float]:
        """Slots each row of the layer keeps after this forward."""
        held, layers, most = self.held[layer], self.facts.cut_layers, self._most(layer)
        if self.mode == "prefill":
            return self.compression.keep(self.seen, held, layer, layers, most)
        if self.mode != "decode":
            return held
        clock = (self.decoded, self.decoded + q)
        keep = self.compression.after_forward(self.seen, held, clock, layer, layers, most)
        return held if keep is None else keep

    def until_due(self, limit: int) -> int:
        """Tokens that every row may be fed in one forward so that it ends at the next cut, or where the next pairs are
        quantised, and at most `limit`."""
        compression, schedule = self.compression, self.compression.schedule
        may_be_cut = self.facts.cut_layers
        layers = [i for i in may_be_cut if i not in schedule.skip_layers]
        if compression.storage.quantises:
            limit = min(limit, compression.storage.until_due(self.seen[0]))
        if not schedule.online or not compression.method.compresses or not layers:
            return limit

        def excess(more: int) -> float:
            """Most slots over its budget that any row would hold after so many more tokens."""
            most = 0.0
            for i in layers:
                held, seen = [h + more for h in self.held[i]], [n + more for n in self.seen]
                keep = compression.keep(seen, held, i, may_be_cut, self._most(i))
                most = max(most, *(h - k for h, k in zip(held, keep, strict=True)))
            return most

        if schedule.trigger == "clock":
            step = schedule.until_due(self.decoded)
            slides = compression.open or any(
                map(self._loses_sight, layers)
            )  # then a cut may find something to leave out
            while step < limit and not slides and not excess(step):  # a cut at which no row loses anything is none
                step += schedule.compress_every
            if step > limit and step > schedule.compress_every and excess(limit):
                step -= schedule.compress_every  # a forward across that tick would cut where no tick is
        else:
            step = 0
            while step < limit and (lacking := schedule.compress_every - excess(step)) > 0:
                step += ceil(lacking)  # it grows by one a token at most
        return max(1, min(step, limit))

    def _scored(self, step: Step, keep: Sequence[float], in_sight: torch.Tensor | None) -> tuple[View, torch.Tensor]:
        """What a cut of the step's layer goes by: the view of it and its scores [B, 1 or K, N]; keep: by row.

        Args:
            in_sight: [B, 1 or K, N] slots that may stay, None: all.
        """
        store = self.stores[step.layer]
        view = self._view(step, keep)
        scores = self.compression.score(view)
        if self.mode == "prefill":
            undefined = (scores.isnan() & (store.pos >= 0)).any()  # scores of empty slots mean nothing
            self._undefined = {**self._undefined, step.layer: undefined}
        if in_sight is not None:
            view = dataclasses.replace(view, pos=store.pos.masked_fill(~in_sight, -1))
        return view, scores

    def _view(self, step: Step, keep: Sequence[float]) -> View:
        """The step's layer as the method sees it; keep: slots that stay, by row."""
        layer, store, method = step.layer, self.stores[step.layer], self.compression.method
        moves_keys = self.compression.moves_keys is not None
        return View(
            keys=store.keys,
            values=store.values,
            pos=store.pos,
            seen=self.seen,
            keep=[ceil(min(k, h)) for k, h in zip(keep, self.held[layer], strict=True)],
            layer=layer,
            num_layers=len(self.stores),
            _mass=store.mass,
            bias=store.bias,
            memory=store.memory,
            _moments=store.moments,
            scaling=step.scaling,
            method=method.name,
            num_queries=method.num_queries,
            _rotate=partial(self._rotate, layer) if moves_keys else None,
            _attend=lambda last: window_attention(store, last, step),
            _votes={} if self._last_votes is None or self.compression.waits else {1: self._last_votes},
            _logits=lambda last: window_logits(store, last, step),
            _queries=store.observed,
            _output_norms=partial(output_norms, self.facts, layer, store.values) if method.projects else None,
        )

    def _cut(self, step: Step, keep: list[float], in_sight: torch.Tensor | None = None) -> None:
        """Cuts the step's layer to `keep` slots a row; in_sight: [B, 1 or K, N] slots that may stay, None: all."""
        layer = step.layer
        store, held = self.stores[layer], self.held[layer]
        view, scores = self._scored(step, keep, in_sight)
        fresh = [h == s for h, s in zip(held, self.seen, strict=True)]  # rows that lose tokens for the first time
        if self._leaves_holes(layer, scores, keep):
            blank_lowest(scores, store.pos, [int(h - k) for h, k in zip(held, keep, strict=True)])
            store.holes = True
            self.held[layer] = keep
        else:
            self._close_ranks(
                layer, view, scores, self.compression.counts(scores, view.pos, keep, self.seen, held, layer)
            )
            if self.compression.exact and not self.compression.open:
                self.held[layer] = keep
        if self._loses_sight(layer):
            self.held[layer] = _counted(store.pos >= 0)
        if self.compression.method.in_cache_sinks and self.facts.rotates(layer):
            self._move_sinks(layer, fresh)

    def _leaves_holes(self, layer: int, scores: torch.Tensor, keep: list[float]) -> bool:
        """Whether the pairs that go are only hidden, in their places, because they are few: everything moves once in a
        while and not at every token."""
        store, held, compression = self.stores[layer], self.held[layer], self.compression
        return (
            self.mode == "decode"
            and compression.slotwise
            and compression.evicted.forgets
            and self._even(layer)
            and not compression.storage.quantises
            and scores.shape[1] <= store.pos.shape[1]
            and max(h - k for h, k in zip(held, keep, strict=True)) <= FEW
        )

    def _close_ranks(self, layer: int, view: View, scores: torch.Tensor, counts: torch.Tensor) -> None:
        """Cuts the layer to counts [B, 1 or K] slots, those with the highest scores [B, 1 or K, N], which then stand
        without gaps."""
        store = self.stores[layer]
        if self.compression.open and bool((counts == (store.pos >= 0).sum(-1).cpu()).all()):
            return  # nothing goes
        scores, counts = self.compression.second_look(view, scores, counts)
        kept = self.compression.evicted.cut(self.compression.method, view, scores, counts)
        store.replace(kept, room=min(self.compression.schedule.compress_every, MAX_ROOM))
        if self.compression.method.every_query:
            store.forget_queries(self.compression.method.num_queries)
        self.held[layer] = [sum(row) / len(row) for row in counts.tolist()]

    def _lost(self, layer: int) -> list[float]:
        """How many places each row's sinks have to move up to be right before the window."""
        return [seen - held for seen, held in zip(self.seen, self.held[layer], strict=True)]

    def _move_sinks(self, layer: int, fresh: list[bool]) -> None:
        """Rotates the sink keys of each row forward by the number of tokens it has lost, from their pristine copy."""
        store, sinks = self.stores[layer], self.compression.method.in_cache_sinks
        rope = self.facts.rope
        assert rope is not None
        device = store.keys.device
        start = (store.pos[:, 0] >= 0).int().argmax(-1)  # sinks stay, so that nothing between them is empty
        slots = (start[:, None] + torch.arange(sinks, device=device)).clamp_max(store.length - 1)  # [B, S]
        index = slots[:, None, :, None].expand(-1, store.keys.shape[1], -1, store.keys.shape[3])
        lost = tuple(self._lost(layer))
        pristine = store.pristine_sinks
        current = pristine if pristine is not None and all(lost) and not any(fresh) else store.keys.gather(2, index)
        if pristine is None:
            pristine = current
        elif any(fresh):
            pristine = torch.where(to_device(fresh, device).view(-1, 1, 1, 1), current, pristine)
        store.pristine_sinks = pristine
        moved = rope.rotate(pristine, self._delta(lost, device), layer)
        if not all(lost):
            untouched = to_device([n == 0 for n in lost], device).view(-1, 1, 1, 1)
            moved = torch.where(untouched, current, moved)
        store.write_sinks(index, moved)

    def _delta(self, lost: tuple[float, ...], device: torch.device) -> torch.Tensor:
        """How far each row's sinks go, [B, 1]: one tensor for all layers of a step, which mostly have lost as many."""
        if lost != self._turned[0] or self._turned[1].device != device:
            self._turned = (lost, to_device(lost, device).long().view(-1, 1))
        return self._turned[1]

    _turned: tuple[tuple[float, ...], torch.Tensor] = ((), torch.zeros(0))

    # ------------------------------------------------------------------------------------ numbers

    def count_only(self, prefilled: Sequence[int], contexts: Sequence[int]) -> None:
        """Lets the numbers speak of contexts of so many tokens: a continuation scored in one forward is not kept."""
        held, peaks = self.held, self.peaks
        for tokens in (prefilled, contexts):
            self.seen = list(tokens)
            self.held = [[min(h, n) for h, n in zip(layer, tokens, strict=True)] for layer in held]
            self.peaks = [min(p, n) for p, n in zip(peaks, tokens, strict=True)]
            if tokens is prefilled:
                self.prefill_end = self.snapshot()

    def snapshot(self, decode_steps: Sequence[int] | None = None) -> dict[str, Any]:
        """Sizes of each row now, or after its own number of decode steps. Bytes are of keys and values.

        They are of the whole model, of which tensor parallelism gives this process a share. `valid` leaves out empty
        slots; `allocated` is the storage as it is now, shared evenly by the rows of the batch.
        """
        if self.end is not None:
            return self.end
        rows = range(len(self.seen))
        held, peaks, seen = self.held, self.peaks, list(self.seen)
        valid = self._valid_bytes()
        if decode_steps is not None and self.history:
            picked = [self.history[min(n, len(self.history) - 1)][b] for b, n in enumerate(decode_steps)]
            held = [[numbers[0][i] for numbers in picked] for i in range(len(self.stores))]
            peaks, valid = [numbers[1] for numbers in picked], [numbers[2] for numbers in picked]
            taken = len(self.history) - 1
            seen = [s - max(0, taken - n) for s, n in zip(seen, decode_steps, strict=True)]
        cut = self.facts.cut_layers
        ranks = self.facts.ranks
        exact = [sum(row) * ranks for row in zip(*map(LayerStore.valid_bytes, self.stores, held), strict=True)]
        in_view = self.compression.in_view
        used = [[in_view(seen[b], held[i][b], i, cut) for i in cut] for b in rows]
        compresses = self.compression.method.compresses
        return {
            "seen": seen,
            "kept_fraction": [sum(used[b]) / len(cut) / seen[b] if seen[b] else 1.0 for b in rows],
            "compressed": [(compresses and min(used[b]) < seen[b]) or valid[b] != exact[b] for b in rows],
            "kv_bytes_valid": valid,
            "kv_bytes_read": valid,
            "kv_bytes_allocated": ranks * sum(s.allocated_bytes for s in self.stores) / max(len(rows), 1),
            "overhead_bytes": (ranks * sum(s.overhead_bytes for s in self.stores) + self._shared_bytes())
            / max(len(rows), 1),
            "peak_slots": list(peaks),
            "over_budget": [self.compression.over_budget(n) for n in seen],
        }


def together(snapshots: Sequence[dict[str, Any]], rows: Sequence[int]) -> dict[str, Any]:
    """Those of several segments as one, rows one after the other; what is not by row is their mean."""
    out: dict[str, Any] = {}
    for name, first in snapshots[0].items():
        values = [snapshot[name] for snapshot in snapshots]
        if isinstance(first, list):
            out[name] = [x for value in values for x in value]
        else:
            out[name] = sum(x * n for x, n in zip(values, rows, strict=True)) / sum(rows)
    return out


def _without_tensors(step: Step) -> Step:
    """What a later cut asks of a step, without holding on to its tokens."""
    none = step.query.new_empty(1, 1, step.tokens, 0)
    return step._replace(query=none, key=none, value=none, pos=step.pos.new_empty(0), hidden=None)


def _counted(real: torch.Tensor) -> list[float]:
    """How many of the slots [B, 1 or K, N] are real, for each row the mean over its heads."""
    return real.sum(-1).to(sum_dtype(real.device)).mean(1).tolist()

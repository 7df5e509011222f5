"""CompressedCache: what transformers sees as a Cache, and where compression happens.

`update()` only tags the new keys with this cache and lets them through. The attention function (`attention.py`)
receives them together with queries, positions and padding, stores them here, attends, and calls `after_attention`,
which cuts the layer before the next one runs: during a prefill at most one layer is whole.

Shapes: B batch rows, K KV heads, N slots, M slots kept, q new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import ceil
from typing import Any, ClassVar, Literal

import torch

from kv_lm_eval.cache.attention import Step, attend_stored, window_attention
from kv_lm_eval.cache.face import Face
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.moments import QueryMoments
from kv_lm_eval.cache.quantized import QuantizedStore
from kv_lm_eval.cache.store import LayerStore
from kv_lm_eval.cache.transfer import at_least_float32, sum_dtype, to_device
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.methods.evicted import blank_lowest

FEW = 4  # pairs that one cut may hide in their places instead of moving the others
MAX_ROOM = 1024  # slots reserved for the tokens until the next cut, at most; storage grows by itself
TRIM_EVERY = 64  # tokens a row sees until its sliding-window layers that are never cut drop what they cannot see
MOMENTS_BLOCK = 1024  # queries turned back in float32 at a time
Mode = Literal["prefill", "decode", "stream", "hold", "score"]


class CompressedCache(Face):
    """The KV cache of one batch under one compression.

    Args:
        compression: the method with its budget, schedule and treatment of the evicted.
        facts: what the self-check found out about the model.

    Attributes:
        mode: what the next forward is.
            "prefill": the end of the prompts, cut after it; becomes "decode" by itself at the next forward;
            "decode": tokens after the prefill, cut when the schedule says so;
            "stream": the same for right-padded rows of documents: one that has ended is left as it is;
            "hold": stored and not cut;
            "score": read only, nothing is stored (`branch` says which new tokens see each other).
        seen: tokens fed per row, padding not counted. held: slots in use per row, by layer. peaks: most slots that any
            layer of the row that may be cut ever held.
        decoded: the schedule's clock, tokens fed since the end of the prefill.
        around_cut: a context manager entered for each layer's cut, to measure it.
        prefill_chunk: tokens of a prompt in one forward, None: all (`engine/prefill.py` does it).
        prefill_evicts: whether the cache is cut between the chunks.
        history: (held, peaks, valid bytes) after the prefill and after each decode step, so that a batch whose rows end
            at different steps can be told apart afterwards.
        serves: what a class can do beyond dropping pairs, by the method's name for it.

    Raises:
        TypeError: the method needs another class of cache; `make_cache` gives the right one.
    """

    serves: ClassVar[tuple[str, ...]] = ()

    def __init__(self, compression: Compression, facts: ModelFacts, mode: Mode = "prefill") -> None:
        super().__init__(facts.num_layers)
        for needed in ("ring", "reinserted"):
            if getattr(compression.method, needed) and needed not in self.serves:
                raise TypeError(
                    f"{type(self).__name__} cannot serve a method with {needed}={getattr(compression.method, needed)}: "
                    "it would be measured under another cache's name; make_cache gives the right class"
                )
        self.compression = compression
        self.facts = facts
        self.around_cut: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.prefill_chunk: int | None = None
        self.prefill_evicts = False
        self._start(mode)

    def _start(self, mode: Mode) -> None:
        """Nothing has been seen, nothing is held."""
        self.mode: Mode = mode
        self.stores = [self._new_store(i) for i in range(self.facts.num_layers)]
        self.seen: list[int] = []
        self.held: list[list[float]] = [[] for _ in range(self.facts.num_layers)]
        self.peaks: list[float] = []
        self.prefill_end: dict[str, Any] | None = None
        self.history: list[tuple[list[list[float]], list[float], list[float]]] = []
        self.decoded = 0
        self.branch: torch.Tensor | None = None
        self.new_pos: torch.Tensor | None = None  # [B, q] of the running forward
        self.new_counts: list[int] = []  # real tokens per row of the running forward
        self.next_counts: list[int] | None = None  # the same for the next forward, where the caller knows
        self.padded = False  # whether the running forward has padded tokens
        self.scattered = False  # whether some of these would stand between a row's pairs, or after them
        self._columns = 0  # tokens of the longest row, padding included

    def _new_store(self, layer: int) -> LayerStore:
        storage = self.compression.storage
        if not storage.quantises:
            return LayerStore()
        return QuantizedStore(storage, self.compression.method.in_cache_sinks if self.facts.compressible(layer) else 0)

    # ------------------------------------------------------------------------------------ transformers' protocol

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
        if layer_idx == 0:
            self.new_pos = None
        return super().update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by the longest row, padding included: never the number of slots."""
        return self._columns

    def reset(self) -> None:
        self._start("prefill")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select_in_place(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.seen)).repeat_interleave(repeats)
        self._select_in_place(rows)

    # ------------------------------------------------------------------------------------ rows

    def select(self, rows: torch.Tensor) -> CompressedCache:
        """A copy with the given rows (repeats allowed): the fork from which several continuations go on."""
        new = type(self)(self.compression, self.facts, self.mode)
        new._columns, new.decoded = self._columns, self.decoded
        new.prefill_end, new.around_cut = self.prefill_end, self.around_cut
        picked = rows.tolist()
        new.seen, new.peaks = [self.seen[i] for i in picked], [self.peaks[i] for i in picked]
        new.held = [[held[i] for i in picked] for held in self.held]
        new.stores = [store.select(rows) for store in self.stores]
        return new

    def _select_in_place(self, rows: torch.Tensor) -> None:
        new = self.select(rows)
        self.stores, self.seen, self.held, self.peaks = new.stores, new.seen, new.held, new.peaks
        self.history = []  # rows are no longer those of before

    # ------------------------------------------------------------------------------------ one forward

    def next_positions(self) -> list[int]:
        """Position of each row's next token."""
        return self.seen

    def attend(self, step: Step) -> torch.Tensor:
        """One layer's attention, [B, H, q, D]; the new pairs are stored before it and the layer is cut after it."""
        out = attend_stored(self, step)
        self.after_attention(step)
        return out

    def begin(self, position_ids: torch.Tensor, attention_mask: torch.Tensor | None, batch: int) -> None:
        """Called by the first layer's attention: notes positions and counts of the new tokens."""
        if self.mode == "prefill" and self.prefill_end is not None:
            self.mode = "decode"
        q = position_ids.shape[-1]
        pos = position_ids.expand(batch, q)
        self.padded = attention_mask is not None
        if attention_mask is None:
            self.new_counts = [q] * batch
        else:
            new_mask = attention_mask[:, -q:].bool()
            pos = torch.where(new_mask, pos, -1)
            if self.next_counts is not None:
                self.new_counts = self.next_counts
            elif (
                self.mode == "decode" and q == 1
            ):  # a step of generate(): every row gets a token, no need to ask the device
                self.new_counts = [1] * batch
            else:
                self.new_counts = new_mask.sum(1).tolist()
            self.padded = min(self.new_counts) < q
        self.next_counts = None
        self.new_pos = pos
        self.scattered = self.padded and (any(self.seen) or bool(((pos[:, :-1] >= 0) & (pos[:, 1:] < 0)).any()))
        if not self.seen:
            self.seen, self.peaks = [0] * batch, [0] * batch
            self.held = [[0] * batch for _ in self.stores]
        if self.mode != "score":
            self.seen = [s + n for s, n in zip(self.seen, self.new_counts, strict=True)]
            self._columns += q

    def _longest(self, layer: int) -> int:
        """Pairs of the row and head of the layer that has most."""
        if self._even(layer):
            return int(max(self.held[layer]))
        return int((self.stores[layer].pos >= 0).sum(-1).max())

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
        """Whether any row of the layer has empty slots, so that a mask is needed."""
        store = self.stores[layer]
        return not store.is_empty and min(self.held[layer]) < store.length

    def appended(self, layer: int) -> None:
        """Counts the new slots of a layer, after they were stored."""
        self.held[layer] = [h + n for h, n in zip(self.held[layer], self.new_counts, strict=True)]
        if self.facts.compressible(layer):
            self.peaks = [max(p, h) for p, h in zip(self.peaks, self.held[layer], strict=True)]

    @property
    def observes(self) -> bool:
        """Whether the running forward's queries may matter to a later cut."""
        if not self.compression.method.compresses or self.mode == "score":
            return False
        return self.mode in ("prefill", "hold") or self.compression.schedule.online

    def per_query_head(self, layer: int) -> bool:
        """Whether the layer holds keys and values for every query head, as methods ask that choose for each."""
        return self.compression.method.per_query_head and self.facts.compressible(layer)

    def add_moments(self, layer: int, query: torch.Tensor, pos: torch.Tensor) -> None:
        """Adds queries [B, H, q, D] at positions [B, q] (-1: padding) to the layer's moments, turned back to 0."""
        store, first = self.stores[layer], self.compression.method.moments_from
        if store.moments is None:
            store.moments = QueryMoments.none_yet(query)
        for block, at in zip(query.split(MOMENTS_BLOCK, dim=2), pos.split(MOMENTS_BLOCK, dim=1), strict=True):
            store.moments.add(self._rotate(layer, at_least_float32(block), -at), (at >= 0) & (at >= first))

    def _rotate(self, layer: int, x: torch.Tensor, delta: torch.Tensor, over: int = 1) -> torch.Tensor:
        """See `RopeKit.rotate`; what the model does not rotate stays as it is."""
        assert self.facts.rope is not None
        if self.facts.rope_kinds[layer] == "nope":
            return x
        return self.facts.rope.rotate(x, delta, layer, over)

    def after_attention(self, step: Step) -> None:
        """Cuts the layer if this forward is the end of the prefill or the schedule says so."""
        layer = step.layer
        last = layer == len(self.stores) - 1
        if self.scattered and self.mode != "score":
            self.stores[layer].compact(self._longest(layer))
        q = self.new_pos.shape[1] if self.new_pos is not None else 0
        if self._is_cut(layer):
            self._cut_if_due(step, q)
        elif self.mode != "score":
            self._trim_sliding(layer)
        if self.mode == "prefill" and not self.compression.schedule.online:
            self.stores[layer].forget_observations()
        if self.compression.storage.quantises and self.mode in ("prefill", "decode", "stream"):
            self.stores[layer].settle(self._due_rows())
        if last and self.mode in ("decode", "stream"):
            self.decoded += q
        if last and self.mode in ("prefill", "decode"):
            self.history.append(([list(h) for h in self.held], list(self.peaks), self._valid_bytes()))
        if last and self.mode == "prefill":
            self.prefill_end = self.snapshot()

    def _due_rows(self) -> list[bool]:
        """Rows whose pairs change their form after this forward: all at the end of their prompt."""
        if self.mode == "prefill":
            return [True] * len(self.seen)
        due = self.compression.storage.due
        return [due(seen - new, seen) for seen, new in zip(self.seen, self.new_counts, strict=True)]

    def _valid_bytes(self) -> list[float]:
        by_layer = [store.valid_bytes(held) for store, held in zip(self.stores, self.held, strict=True)]
        return [sum(row) * self.facts.ranks for row in zip(*by_layer, strict=True)]

    def _trim_sliding(self, layer: int) -> None:
        """Drops what a layer of the model's own sliding window, which is never cut, can never see again.

        Each time a row has seen a multiple of TRIM_EVERY tokens: a clock of its own, whatever forwards they came in.
        """
        window = self.facts.sliding_windows[layer]
        if window is None:
            return
        first = [max(0, n // TRIM_EVERY * TRIM_EVERY - (window - 1)) for n in self.seen]
        before = [n - new for n, new in zip(self.seen, self.new_counts, strict=True)]
        ticks = [n // TRIM_EVERY > b // TRIM_EVERY for n, b in zip(self.seen, before, strict=True)]
        if any(f and now for f, now in zip(first, ticks, strict=True)):
            self.held[layer] = [n - f for n, f in zip(self.seen, first, strict=True)]
            self.stores[layer].compact(int(max(self.held[layer])), first=first)

    def _cut_if_due(self, step: Step, q: int) -> None:
        """Cuts the layer to its budget if this forward ends with a cut; what its own window no longer shows goes first:
        it may vote, it is neither counted nor chosen."""
        layer, store, most = step.layer, self.stores[step.layer], self._most(step.layer)
        first = None
        if most is not None:
            due = self._rows_due(layer)
            first = [max(0, n - most) if row else 0 for n, row in zip(self.seen, due, strict=True)]
        if first is None or not any(first):
            keep, in_sight = self._keep(layer, q), None
            if keep == self.held[layer]:
                return
        else:
            in_sight = (store.pos >= 0) & (store.pos >= to_device(first, store.pos.device).view(-1, 1, 1))
            self.held[layer] = _counted(in_sight)
            keep = self._keep(layer, q)
            if keep == self.held[layer]:
                store.compact(int(in_sight.sum(-1).max()), first=first)
                return
        with self.around_cut():
            self._cut(step, keep, in_sight)

    def _is_cut(self, layer: int) -> bool:
        """Whether the method ever cuts the layer."""
        skipped = layer in self.compression.schedule.skip_layers
        return self.compression.method.compresses and self.facts.compressible(layer) and not skipped

    def _rows_due(self, layer: int) -> list[bool]:
        """Rows of the layer to which a cut comes after the running forward, even if they hold too little for it."""
        schedule, rows = self.compression.schedule, self._rows_cut()
        if self.mode == "prefill":
            return rows
        if self.mode not in ("decode", "stream") or not schedule.online:
            return [False] * len(rows)
        q = self.new_pos.shape[1] if self.new_pos is not None else 0
        if schedule.trigger == "clock":
            return [row and schedule.due(self.decoded, self.decoded + q) for row in rows]
        return [k < h for k, h in zip(self._keep(layer, q), self.held[layer], strict=True)]

    def _keep(self, layer: int, q: int) -> list[float]:
        """Slots each row of the layer keeps after this forward."""
        held, layers, most = self.held[layer], self.facts.cut_layers, self._most(layer)
        if self.mode == "prefill":
            return self.compression.keep(self.seen, held, layer, layers, most)
        if self.mode not in ("decode", "stream"):
            return held
        keep = self.compression.after_forward(self.seen, held, self.decoded, self.decoded + q, layer, layers, most)
        if keep is None:
            return held
        return [k if row else h for k, h, row in zip(keep, held, self._rows_cut(), strict=True)]

    def _rows_cut(self) -> list[bool]:
        """Rows that a cut after this forward concerns: documents that have ended are left as they are."""
        q = self.new_pos.shape[1] if self.new_pos is not None else 0
        return [self.mode != "stream" or n == q for n in self.new_counts]

    def until_due(self, limit: int, alive: Sequence[bool] | None = None) -> int:
        """Tokens that every row may be fed in one forward so that it ends at the next cut, or where the next pairs are
        quantised, and at most `limit`.

        Args:
            alive: rows that still grow; default all.
        """
        compression, schedule = self.compression, self.compression.schedule
        may_be_cut = self.facts.cut_layers
        layers = [i for i in may_be_cut if i not in schedule.skip_layers]
        growing = [b for b in range(len(self.seen)) if alive is None or alive[b]]
        if compression.storage.quantises:
            limit = min(limit, *(compression.storage.until_due(n) for n in [self.seen[b] for b in growing] or [0]))
        if not schedule.online or not compression.method.compresses or not layers:
            return limit

        def excess(more: int) -> float:
            """Most slots over its budget that any row would hold after so many more tokens."""
            most = 0.0
            for i in layers:
                held = [self.held[i][b] + more for b in growing] or [more]
                seen = [self.seen[b] + more for b in growing] or [more]
                keep = compression.keep(seen, held, i, may_be_cut, self._most(i))
                most = max(most, *(h - k for h, k in zip(held, keep, strict=True)))
            return most

        if schedule.trigger == "clock":
            step = schedule.until_due(self.decoded)
            slides = any(map(self._loses_sight, layers))  # then a cut has something to leave out
            while step < limit and not slides and not excess(step):  # a cut at which no row loses anything is none
                step += schedule.compress_every
            if step > limit and step > schedule.compress_every and excess(limit):
                step -= schedule.compress_every  # a forward across that tick would cut where no tick is
        else:
            step = 0
            while step < limit and (lacking := schedule.compress_every - excess(step)) > 0:
                step += ceil(lacking)  # it grows by one a token at most
        return max(1, min(step, limit))

    def _cut(self, step: Step, keep: list[float], in_sight: torch.Tensor | None = None) -> None:
        """Cuts the step's layer to `keep` slots a row; in_sight: [B, 1 or K, N] slots that may stay, None: all."""
        layer = step.layer
        store, held, method = self.stores[layer], self.held[layer], self.compression.method
        moves_keys = self.compression.moves_keys is not None
        view = View(
            keys=store.keys,
            values=store.values,
            pos=store.pos,
            seen=self.seen,
            keep=[ceil(k) for k in keep],
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
            _attend=lambda last: window_attention(store, last, step.scaling, step.softcap, step.window),
        )
        scores = self.compression.score(view)
        if self.mode == "prefill" and (scores.isnan() & (store.pos >= 0)).any():  # scores of empty slots mean nothing
            raise UserError(
                f"method={method.name} scored a token NaN in layer {layer}, so that which tokens stay would be chance"
            )
        if in_sight is not None:
            view = dataclasses.replace(view, pos=store.pos.masked_fill(~in_sight, -1))
        if self._leaves_holes(layer, scores, keep):
            blank_lowest(scores, store.pos, [int(h - k) for h, k in zip(held, keep, strict=True)])
            store.holes = True
        else:
            keep = self._close_ranks(layer, view, scores, keep)
        fresh = [h == s for h, s in zip(held, self.seen, strict=True)]  # rows that lose tokens for the first time
        self.held[layer] = _counted(store.pos >= 0) if self._loses_sight(layer) else keep
        if self.compression.method.in_cache_sinks and self.facts.rope_kinds[layer] == "rope":
            self._move_sinks(layer, fresh)

    def _leaves_holes(self, layer: int, scores: torch.Tensor, keep: list[float]) -> bool:
        """Whether the pairs that go are only hidden, in their places, because they are few: everything moves once in a
        while and not at every token."""
        store, held, compression = self.stores[layer], self.held[layer], self.compression
        return (
            self.mode in ("decode", "stream")
            and compression.method.slotwise
            and compression.evicted.forgets
            and self._even(layer)
            and not compression.storage.quantises
            and scores.shape[1] <= store.pos.shape[1]
            and max(h - k for h, k in zip(held, keep, strict=True)) <= FEW
        )

    def _close_ranks(self, layer: int, view: View, scores: torch.Tensor, keep: list[float]) -> list[float]:
        """Cuts the layer so that what stays stands without gaps; returns the slots that each row then holds."""
        store, held = self.stores[layer], self.held[layer]
        counts = self.compression.counts(scores, view.pos, keep, self.seen, held, layer)
        kept = self.compression.evicted.cut(self.compression.method, view, scores, counts)
        store.replace(kept, room=min(self.compression.schedule.compress_every, MAX_ROOM))
        return keep if self.compression.heads.exact else counts.double().mean(1).tolist()

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
        current = store.keys.gather(2, index)
        if store.pristine_sinks is None:
            store.pristine_sinks = current
        else:
            first_time = to_device(fresh, device).view(-1, 1, 1, 1)
            store.pristine_sinks = torch.where(first_time, current, store.pristine_sinks)
        lost = self._lost(layer)
        delta = to_device(lost, device).view(-1, 1)
        moved = rope.rotate(store.pristine_sinks, delta, layer)
        untouched = to_device([n == 0 for n in lost], device).view(-1, 1, 1, 1)
        store.write_sinks(index, torch.where(untouched, current, moved))

    # ------------------------------------------------------------------------------------ numbers

    def count_only(self, prefilled: list[int], contexts: list[int]) -> None:
        """Lets the numbers speak of contexts of so many tokens: a continuation scored in one forward is not kept."""
        held, peaks = self.held, self.peaks
        for tokens in (prefilled, contexts):
            self.seen = tokens
            self.held = [[min(h, n) for h, n in zip(layer, tokens, strict=True)] for layer in held]
            self.peaks = [min(p, n) for p, n in zip(peaks, tokens, strict=True)]
            if tokens is prefilled:
                self.prefill_end = self.snapshot()

    def snapshot(self, decode_steps: list[int] | None = None) -> dict[str, Any]:
        """Sizes of each row now, or after its own number of decode steps. Bytes are of keys and values.

        They are of the whole model, of which tensor parallelism gives this process a share. `valid` leaves out empty
        slots; `allocated` is the storage as it is now, shared evenly by the rows of the batch.
        """
        rows = range(len(self.seen))
        held, peaks, seen = self.held, self.peaks, list(self.seen)
        valid = self._valid_bytes()
        if decode_steps is not None and self.history:
            picked = [self.history[min(n, len(self.history) - 1)] for n in decode_steps]
            held = [[picked[b][0][i][b] for b in rows] for i in range(len(self.stores))]
            peaks, valid = [picked[b][1][b] for b in rows], [picked[b][2][b] for b in rows]
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
            "kv_bytes_allocated": ranks * sum(s.allocated_bytes for s in self.stores) / max(len(rows), 1),
            "overhead_bytes": ranks * sum(s.overhead_bytes for s in self.stores) / max(len(rows), 1),
            "peak_slots": list(peaks),
            "over_budget": [self.compression.over_budget(n) for n in seen],
        }


def _counted(real: torch.Tensor) -> list[float]:
    """How many of the slots [B, 1 or K, N] are real, for each row the mean over its heads."""
    return real.sum(-1).to(sum_dtype(real.device)).mean(1).tolist()

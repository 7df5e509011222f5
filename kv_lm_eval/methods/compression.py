"""A method put together: scorer x budget x schedule x treatment of the evicted, as one frozen object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from kv_lm_eval.cache.view import AskedOfCompression
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, Sight, View
from kv_lm_eval.methods.budget import Budget, Heads, Layers, Ratio
from kv_lm_eval.methods.evicted import Evicted
from kv_lm_eval.methods.schedule import Schedule
from kv_lm_eval.methods.storage import Storage
from kv_lm_eval.methods.unit import Unit

if TYPE_CHECKING:
    from kv_lm_eval.cache.cache import CompressedCache
    from kv_lm_eval.cache.facts import ModelFacts


@dataclass(frozen=True)
class Compression:
    """What the cache needs to know of a method, and all that it needs."""

    method: Method
    budget: Budget
    schedule: Schedule
    evicted: Evicted
    heads: Heads = field(default_factory=Heads)
    storage: Storage = field(default_factory=Storage)
    layers: Layers = field(default_factory=Layers)
    unit: Unit = field(default_factory=Unit)

    def keep(
        self, seen: list[int], held: list[float], layer: int, layers: Sequence[int], most: int | None = None
    ) -> list[float]:
        """Slots each row may keep: its budget, never less than what the method protects, never more than it holds.

        Args:
            layers: those that the model lets be cut; they share the budget, without those of skip_layers.
            most: pairs that the layer can hold where its own window shows no more; None: all that it has seen.
        """
        if layer in self.schedule.skip_layers or self.method.hides:
            return list(held)
        asked, protected = self.budget.asked(seen, held, layer), self.method.protected
        if self.layers.differ:
            sharing = [i for i in layers if i not in self.schedule.skip_layers]
            place = sharing.index(layer), len(sharing)
            there = seen if most is None else [min(n, most) for n in seen]
            asked = [self.layers.share(int(a), n, *place, protected) for a, n in zip(asked, there, strict=True)]
        return [min(h, max(a, protected, self.budget.least)) for a, h in zip(asked, held, strict=True)]

    @property
    def open(self) -> bool:
        """Whether how many slots a layer keeps is known only when they are scored."""
        return self.budget.open or self.layers.together

    @property
    def ranks_layers(self) -> bool:
        """Whether the slots of all layers are ranked together."""
        return self.layers.together

    @property
    def waits(self) -> bool:
        """Whether no layer is cut before the last one has attended."""
        return self.layers.together or self.method.reads_again

    def over_budget(self, tokens: int) -> bool:
        """Whether the slots that always stay are all that a prompt of so many tokens keeps, or more than was asked."""
        if not self.method.compresses or self.method.hides:
            return False
        asked = self.budget.asked([tokens], [tokens], 0)[0]
        protected = self.method.protected
        if self.budget.open:
            return False
        return tokens > asked and asked < max(protected + 1 if protected else 0, self.budget.least)

    def score(self, view: View) -> torch.Tensor:
        """The method's scores of all slots, [B, 1 or K, N].

        Raises:
            UserError: they have another shape, so that they do not say which slots stay.
        """
        scores = self.method.score(view)
        b, k, n, _ = view.keys.shape
        if scores.dim() != 3 or scores.shape[0] != b or scores.shape[1] not in (1, k) or scores.shape[2] != n:
            raise UserError(
                f"method={self.method.name} gave scores of shape {list(scores.shape)}: {b} rows, {k} KV heads and {n} "
                f"slots make [{b}, {k}, {n}], or [{b}, 1, {n}] where all heads keep the same tokens"
            )
        return self.budget.adjusted(scores, view.pos, view.seen)

    def counts_of_layers(
        self, scores: Sequence[torch.Tensor], pos: Sequence[torch.Tensor], seen: list[int]
    ) -> list[torch.Tensor]:
        """Slots per row and head that a cut of all layers together leaves in each, [B, heads] on the host.

        Args:
            scores: [B, heads, N] of each layer that is cut; pos: [B, 1 or heads, N], -1 where empty.
        """
        return self.layers.split(scores, pos, self.mean(seen))

    def mean(self, seen: list[int]) -> list[int]:
        """Slots per head that each row may keep, mean over the layers that share them."""
        least = max(self.method.protected, self.budget.least)
        return [max(int(asked), least) for asked in self.budget.asked(seen, seen, 0)]

    @property
    def slotwise(self) -> bool:
        """Whether a slot's score is the same wherever it stands, so that cuts may leave holes."""
        return self.method.slotwise and not self.unit.whole

    @property
    def exact(self) -> bool:
        """Whether a row keeps exactly its budget, mean over the heads."""
        return self.heads.exact and self.unit.exact

    def second_look(self, view: View, scores: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [B, 1 or K, N] and counts [B, 1 or K] by which slots are chosen, once it is known how many each head
        keeps by the first ones."""
        scores = self.method.rescore(view, scores, counts)
        if not self.unit.whole:
            return scores, counts
        scores, sizes = self.unit.ranked(scores, view.pos)
        if self.unit.exact:
            return scores, counts[:, :1]
        there = (view.pos[:, 0] >= 0).sum(-1).tolist()
        asked = [self._chunks(n, count) for n, count in zip(there, counts[:, 0].tolist(), strict=True)]
        return scores, self.unit.counts(sizes, asked)

    def _chunks(self, there: int, slots: int) -> int:
        """How many of the chunks of so many slots stay, where so many slots would."""
        chunks = self.unit.chunks(there)
        if slots >= there:
            return chunks
        share = isinstance(self.budget, Ratio) and not self.layers.differ
        return max(1, self.budget.share(chunks) if share else slots // self.unit.unit_size)  # type: ignore[attr-defined]

    def counts(
        self,
        scores: torch.Tensor,
        pos: torch.Tensor,
        keep: list[float],
        seen: list[int],
        held: list[float],
        layer: int,
    ) -> torch.Tensor:
        """Slots per row and head that a cut leaves, [B, heads], on the host; keep is their mean over the heads, and
        more than that where scores alone decide."""
        if self.budget.open:
            return self.budget.passing(scores, pos)
        shares = [self.budget.by_head(n, layer) for n in seen]
        if all(shares):
            counts = torch.tensor(shares)
        else:
            counts = self.heads.split(scores, pos, [int(k) for k in keep], self.method.protected)
        whole = [k == h for k, h in zip(keep, held, strict=True)]  # rows left as they are, whatever their heads hold
        if any(whole) and max(counts.shape[1], pos.shape[1]) > 1:
            real = (pos >= 0).sum(-1).cpu()
            counts = torch.where(torch.tensor(whole)[:, None], real, counts)
        return counts

    def uniform(self, layer: int) -> bool:
        """Whether all heads of the layer keep the same number of slots."""
        return not self.heads.differ and not self.open and self.budget.by_head(1, layer) is None

    def sight(self, layer: int) -> Sight | None:
        """What the queries of a layer may see of what is held; None: all of it."""
        return None if layer in self.schedule.skip_layers else self.method.sight(layer)

    def in_view(self, seen: int, held: float, layer: int, layers: Sequence[int]) -> float:
        """Slots of those held that count as kept: all, or where the method hides pairs, what a cache would hold."""
        if not self.method.hides or layer in self.schedule.skip_layers:
            return held
        return min(held, self.budget.asked([seen], [held], layer)[0])

    def after_forward(
        self,
        seen: list[int],
        held: list[float],
        clock: tuple[int, int],
        layer: int,
        layers: Sequence[int],
        most: int | None = None,
    ) -> list[float] | None:
        """Slots each row has after a forward; None: no cut is due.

        Args:
            clock: the schedule's, before the forward and after it. The others are those of `keep`.
        """
        schedule = self.schedule
        if not schedule.online or (schedule.trigger == "clock" and not schedule.due(*clock)):
            return None
        keep = self.keep(seen, held, layer, layers, most)
        if schedule.trigger == "excess" and layer not in schedule.skip_layers:
            return [schedule.after_cut(h, k) for h, k in zip(held, keep, strict=True)]
        return keep

    def trace(
        self, prompt: int, new: int, layer: int, layers: Sequence[int], at_most: bool = False
    ) -> Iterator[tuple[float, float]]:
        """Slots a row holds in a layer when it attends, and after the cut: for a prompt of `prompt` tokens in one
        forward (0: none), then for each of `new` tokens, in integers, before anything is run.

        Where scores alone decide how many stay, nothing goes; where all layers share their slots, it is their mean, or
        with `at_most` as many as one of them could have.
        """
        held: float = prompt
        sharing = len(set(layers).difference(self.schedule.skip_layers)) if at_most and self.layers.together else 1
        if prompt:
            kept = self.keep([prompt], [held], layer, layers)[0] if self.method.compresses else held
            kept = min(held, sharing * kept)
            yield held, kept
            held = kept
        for t in range(new):
            held += 1
            after = None
            if self.method.compresses:
                after = self.after_forward([prompt + t + 1], [held], (t, t + 1), layer, layers)
            kept = held if after is None else min(held, sharing * after[0])
            yield held, kept
            held = kept

    def warnings(self, facts: ModelFacts) -> list[str]:
        """What a user should know before trusting this compression on this model."""
        if not self.method.compresses:
            return [*self.method.warnings(facts), *self._never_quantised(facts)]
        every = self.schedule.compress_every
        return [
            *self.method.warnings(facts),
            *self.schedule.warnings(),
            *self.budget.warnings(every, self.method.protected, facts.max_positions),
            *self._never_quantised(facts),
            *self._without_effect(facts),
        ]

    def _never_quantised(self, facts: ModelFacts) -> Iterator[str]:
        longest, residual = facts.max_positions, self.storage.residual_length
        if self.storage.quantises and longest is not None and residual >= longest:
            yield (
                f"residual_length={residual} is no less than the {longest} positions of the model: the newest so many "
                "pairs stay as they are, so that none is quantised in a text that it can take"
            )

    def _without_effect(self, facts: ModelFacts) -> Iterator[str]:
        """Settings that do nothing on this model."""
        skipped = set(self.schedule.skip_layers)
        if bounded := sorted(skipped.difference(facts.cut_layers)):
            yield (
                f"skip_layers={bounded} has no effect: these layers are sliding windows, which are never cut beside "
                "layers of full attention"
            )
        if self.layers.layer_budget == "pyramid":
            if len(set(facts.cut_layers) - skipped) == 1:
                yield "layer_budget=pyramid has no effect: only one layer is cut"
            if self.layers.beta == 1:
                yield "beta=1 makes layer_budget=pyramid the same for every layer: layer_budget=uniform"
        if self.heads.differ and all(kv_heads == 1 for _, kv_heads in facts.heads.values()):
            yield f"head_budget={self.heads.head_budget} has no effect: the model has one KV head a layer"

    def check_model(self, facts: ModelFacts) -> None:
        """Raises UserError where the settings cannot go with this model."""
        self.method.check_model(facts)
        for size in sorted(set(facts.sizes.values())):
            self.storage.check(size)
        longest = facts.max_positions
        if self.storage.quantises and longest is not None and not self.storage.due(0, longest):
            raise UserError(
                f"{self.storage.waits} is more than the {longest} positions of the model: so many tokens pass until "
                "the first pairs are quantised, so that none ever would be"
            )
        if not self.method.compresses:
            return
        skipped, last = set(self.schedule.skip_layers), facts.num_layers - 1
        if missing := sorted(skipped.difference(range(facts.num_layers))):
            raise UserError(f"skip_layers={missing}: the model has no such layers, it has those from 0 to {last}")
        if skipped.issuperset(facts.cut_layers):
            bounded = " and the others are sliding windows" if len(facts.cut_layers) <= last else ""
            raise UserError(
                f"skip_layers={list(self.schedule.skip_layers)} leaves no layer to cut: those that may be are "
                f"{facts.cut_layers}{bounded}. Leaving all whole is method=full"
            )
        if self.method.ring and facts.max_positions is not None:
            slots = self.budget.asked([0], [0], 0)[0]
            if slots > facts.max_positions:
                raise UserError(
                    f"method={self.method.name} takes the memory of its {slots:.0f} slots at once, which are more than "
                    f"the {facts.max_positions} positions of the model: nothing would ever be overwritten, which "
                    "is method=full"
                )

    @property
    def moves_keys(self) -> tuple[str, str] | None:
        """Where keys must be movable in position: the setting that asks for it and one that does not; else None."""
        if self.method.in_cache_sinks:
            return "positions=in_cache", "positions=absolute"
        if self.method.moments_from is not None or self.method.rotates:
            return (
                f"method={self.method.name}",
                "a method that does not look at keys or queries without their positions",
            )
        return self.evicted.moves_keys

    @property
    def banded(self) -> bool:
        """Whether every layer keeps the same first and most recent tokens at every step, known before anything runs."""
        return (
            self.method.sinks_and_recent is not None
            and self.evicted.evicted == "drop"
            and not self.heads.differ
            and not self.schedule.skip_layers
            and not self.per_layer
            and not self.open
            and not self.storage.quantises
        )

    @property
    def lossy(self) -> bool:
        """Whether a later query can find anything but all pairs as the model made them."""
        return self.method.compresses or self.storage.quantises or self.method.pages is not None

    @property
    def per_layer(self) -> bool:
        """Whether layers have budgets of their own."""
        return self.layers.differ or self.budget.per_layer

    def distinct_layers(self, layers: Sequence[int]) -> list[int]:
        """Enough of the layers to have one of every budget and schedule among them."""
        if self.per_layer:
            return list(layers)
        skipped = [i for i in layers if i in self.schedule.skip_layers]
        return skipped[:1] + [i for i in layers if i not in self.schedule.skip_layers][:1]

    def peak_slots(self, prompt: int, new: int, layers: Sequence[int]) -> int:
        """Most slots per KV head that any of the layers will hold over a prompt in one forward and `new` more tokens;
        where scores decide how many stay, the most that any could.

        Args:
            layers: those that the model lets be cut.
        """
        traces = (self.trace(prompt, new, i, layers, at_most=True) for i in self.distinct_layers(layers))
        return ceil(max(held for trace in traces for held, _ in trace))

    def settings(self) -> dict[str, Any]:
        """All settings after defaults, flat, by the names of --model_args."""
        flat: dict[str, Any] = {"method": self.method.name}
        if self.method.source:
            flat["method_source"] = self.method.source
        parts = (
            (self.method, self.budget, self.layers, self.heads, self.schedule, self.evicted)
            if self.method.compresses
            else (self.method,)
        )
        for part in parts:
            flat.update({f.name: getattr(part, f.name) for f in fields(part) if f.repr})
        if self.method.compresses:
            flat["evicted"] = self.evicted.evicted
        flat.update(self.method.notes())
        if self.unit.whole:
            flat.update({f.name: getattr(self.unit, f.name) for f in fields(self.unit)})
        if self.storage.quantises:
            flat.update(self.storage.settings())
        for share, of_it, differs in (("head_budget", "alpha", "ada"), ("layer_budget", "beta", "pyramid")):
            if flat.get(share, differs) != differs:
                del flat[of_it]
        return flat


def compression_of(cache: CompressedCache) -> Compression:
    """The compression that a cache was made for: whole, where the cache knows only what it asks of one."""
    assert isinstance(cache.compression, Compression)
    return cache.compression


_FULFILS: type[AskedOfCompression] = Compression  # mypy proves it: every member that the cache asks for is there

"""A method put together: scorer x budget x schedule x treatment of the evicted, as one frozen object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from kv_lm_eval.methods.base import Method, Sight
from kv_lm_eval.methods.budget import Budget, Heads
from kv_lm_eval.methods.evicted import Evicted
from kv_lm_eval.methods.schedule import Schedule
from kv_lm_eval.methods.storage import Storage

if TYPE_CHECKING:
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

    def keep(self, seen: list[int], held: list[float], layer: int, num_layers: int) -> list[float]:
        """Slots each row may keep: its budget, never less than what the method protects, never more than it holds."""
        if layer in self.schedule.skip_layers or self.method.hides:
            return list(held)
        protected = self.method.protected
        allowed = self.budget.keep(seen, layer, num_layers, held, protected)
        return [min(h, max(a, protected, self.budget.least)) for a, h in zip(allowed, held, strict=True)]

    def counts(
        self,
        scores: torch.Tensor,
        pos: torch.Tensor,
        keep: list[float],
        seen: list[int],
        held: list[float],
        layer: int,
    ) -> torch.Tensor:
        """Slots per row and head that a cut leaves, [B, heads], on the host; keep is their mean over the heads."""
        shares = [self.budget.by_head(n, layer) for n in seen]
        if all(shares):
            counts = torch.tensor(shares)
        else:
            counts = self.heads.split(scores, pos, [int(k) for k in keep])
        whole = [k == h for k, h in zip(keep, held, strict=True)]  # rows left as they are, whatever their heads hold
        if any(whole) and max(counts.shape[1], pos.shape[1]) > 1:
            real = (pos >= 0).sum(-1).cpu()
            counts = torch.where(torch.tensor(whole)[:, None], real, counts)
        return counts

    def uniform(self, layer: int) -> bool:
        """Whether all heads of the layer keep the same number of slots."""
        return self.heads.head_budget == "uniform" and self.budget.by_head(1, layer) is None

    def sight(self, layer: int) -> Sight | None:
        """What the queries of a layer may see of what is held; None: all of it."""
        return None if layer in self.schedule.skip_layers else self.method.sight(layer)

    def in_view(self, seen: int, held: float, layer: int, num_layers: int) -> float:
        """Slots of those held that count as kept: all, or where the method hides pairs, what a cache would hold."""
        if not self.method.hides or layer in self.schedule.skip_layers:
            return held
        return min(held, self.budget.keep([seen], layer, num_layers)[0])

    def after_forward(
        self, seen: list[int], held: list[float], before: int, after: int, layer: int, num_layers: int
    ) -> list[float] | None:
        """Slots each row has after a forward that took the clock from `before` to `after`; None: no cut is due."""
        schedule = self.schedule
        if not schedule.online or (schedule.trigger == "clock" and not schedule.due(before, after)):
            return None
        keep = self.keep(seen, held, layer, num_layers)
        if schedule.trigger == "excess" and layer not in schedule.skip_layers:
            return [schedule.after_cut(h, k) for h, k in zip(held, keep, strict=True)]
        return keep

    def trace(self, prompt: int, new: int, layer: int, num_layers: int) -> Iterator[tuple[float, float]]:
        """Slots a row holds in a layer when it attends, and after the cut: for a prompt of `prompt` tokens in one
        forward (0: none), then for each of `new` tokens, in integers, before anything is run."""
        held: float = prompt
        if prompt:
            kept = self.keep([prompt], [held], layer, num_layers)[0] if self.method.compresses else held
            yield held, kept
            held = kept
        for t in range(new):
            held += 1
            after = None
            if self.method.compresses:
                after = self.after_forward([prompt + t + 1], [held], t, t + 1, layer, num_layers)
            kept = held if after is None else after[0]
            yield held, kept
            held = kept

    def warnings(self, facts: ModelFacts) -> list[str]:
        """What a user should know before trusting this compression on this model."""
        return [*self.method.warnings(facts), *self.schedule.warnings()]

    @property
    def moves_keys(self) -> tuple[str, str] | None:
        """Where keys must be movable in position: the setting that asks for it and one that does not; else None."""
        if self.method.in_cache_sinks:
            return "positions=in_cache", "positions=absolute"
        if self.method.moments_from is not None:
            return f"method={self.method.name}", "a method that does not look at queries without their positions"
        return self.evicted.moves_keys

    @property
    def banded(self) -> bool:
        """Whether every layer keeps the same first and most recent tokens at every step, known before anything runs."""
        return (
            self.method.sinks_and_recent is not None
            and self.evicted.evicted == "drop"
            and self.heads.head_budget == "uniform"
            and not self.schedule.skip_layers
            and not self.budget.per_layer
            and not self.storage.quantises
        )

    @property
    def lossy(self) -> bool:
        """Whether a later query can find anything but all pairs as the model made them."""
        return self.method.compresses or self.storage.quantises

    def distinct_layers(self, layers: Sequence[int]) -> list[int]:
        """Enough of the layers to have one of every budget and schedule among them."""
        if self.budget.per_layer:
            return list(layers)
        skipped = [i for i in layers if i in self.schedule.skip_layers]
        return skipped[:1] + [i for i in layers if i not in self.schedule.skip_layers][:1]

    def peak_slots(self, prompt: int, new: int, num_layers: int) -> int:
        """Most slots per KV head that any layer will hold over a prompt in one forward and `new` more tokens."""
        return ceil(
            max(
                held
                for i in self.distinct_layers(range(num_layers))
                for held, _ in self.trace(prompt, new, i, num_layers)
            )
        )

    def settings(self) -> dict[str, Any]:
        """All settings after defaults, flat, by the names of --model_args."""
        flat: dict[str, Any] = {"method": self.method.name}
        if self.method.source:
            flat["method_source"] = self.method.source
        parts = (
            (self.method, self.budget, self.heads, self.schedule, self.evicted)
            if self.method.compresses
            else (self.method,)
        )
        for part in parts:
            flat.update({f.name: getattr(part, f.name) for f in fields(part) if f.repr})
        if self.method.compresses:
            flat["evicted"] = self.evicted.evicted
        flat.update(self.method.notes())
        if self.storage.quantises:
            flat.update({f.name: getattr(self.storage, f.name) for f in fields(self.storage)})
        if flat.get("head_budget") == "uniform":
            del flat["alpha"]
        return flat

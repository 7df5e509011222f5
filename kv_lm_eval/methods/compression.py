"""A method put together: scorer x budget x schedule x treatment of the evicted, as one frozen object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from math import ceil
from typing import Any

from kv_lm_eval.methods.base import Method
from kv_lm_eval.methods.budget import Budget, Heads
from kv_lm_eval.methods.evicted import Evicted
from kv_lm_eval.methods.schedule import Schedule


@dataclass(frozen=True)
class Compression:
    """What the cache needs to know of a method, and all that it needs."""

    method: Method
    budget: Budget
    schedule: Schedule
    evicted: Evicted
    heads: Heads = field(default_factory=Heads)

    def keep(self, seen: list[int], held: list[float], layer: int, num_layers: int) -> list[float]:
        """Slots each row may keep: its budget, never less than what the method protects, never more than it holds."""
        if layer in self.schedule.skip_layers:
            return list(held)
        protected = self.method.protected
        allowed = self.budget.keep(seen, layer, num_layers, held, protected)
        return [min(h, max(a, protected, 1)) for a, h in zip(allowed, held, strict=True)]

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
            flat.update({f.name: getattr(part, f.name) for f in fields(part)})
        if flat.get("head_budget") == "uniform":
            del flat["alpha"]
        return flat

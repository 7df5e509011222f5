"""A method put together: scorer x budget x schedule x treatment of the evicted, as one frozen object."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
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

    def keep(self, seen: list[int], held: list[int], layer: int, num_layers: int) -> list[int]:
        """Slots each row keeps: its budget, never less than what the method protects, never more than it holds."""
        if layer in self.schedule.skip_layers:
            return list(held)
        protected = self.method.protected
        allowed = self.budget.keep(seen, layer, num_layers, held, protected)
        return [min(h, max(a, protected, 1)) for a, h in zip(allowed, held, strict=True)]

    def evicts(self, length: int, num_layers: int) -> bool:
        """Whether a row of `length` tokens would lose anything in any layer if it were cut now."""
        if not self.method.compresses:
            return False
        return any(self.keep([length], [length], layer, num_layers)[0] < length for layer in range(num_layers))

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

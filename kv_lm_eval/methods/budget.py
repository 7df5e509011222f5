"""HOW MANY slots stay: in integers, so that 0.9 of 100 keeps 90, never 89.

A budget is chosen by the setting that names it: `max_capacity_prompt` (slots) or `keep_ratio` / `compression_ratio`
(a share of the tokens seen).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

from kv_lm_eval.errors import UserError


@dataclass(frozen=True)
class Budget:
    """How many slots each row of a layer keeps."""

    def keep(self, seen: list[int], layer: int, num_layers: int) -> list[int]:
        """Slots that each row of this layer may keep, from the number of tokens the row has seen."""
        raise NotImplementedError

    def check(self, protected: int, method: str) -> None:
        """Raises UserError where the method's always-kept slots leave no room for a choice."""


@dataclass(frozen=True)
class Slots(Budget):
    """A fixed number of slots per KV head and layer."""

    max_capacity_prompt: int = field(
        metadata={"help": "pairs kept per KV head and layer after the prefill, window and sinks included"}
    )

    def __post_init__(self) -> None:
        if self.max_capacity_prompt < 1:
            raise UserError(
                f"max_capacity_prompt={self.max_capacity_prompt} keeps nothing; it is a number of slots, at least 1"
            )

    def keep(self, seen: list[int], layer: int, num_layers: int) -> list[int]:
        return [self.max_capacity_prompt] * len(seen)

    def check(self, protected: int, method: str) -> None:
        if protected and self.max_capacity_prompt <= protected:
            raise UserError(
                f"{method} always keeps {protected} slots (its window and sinks), and "
                f"max_capacity_prompt={self.max_capacity_prompt} leaves no room for scored tokens beside them, so it "
                "would equal a plain window; raise max_capacity_prompt or lower window_size."
            )


@dataclass(frozen=True)
class Ratio(Budget):
    """A share of the tokens seen so far, rounded up: ceil(keep_ratio * tokens)."""

    keep_ratio: float = field(metadata={"help": "share of the tokens seen that is kept, over 0 and at most 1"})

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise UserError(
                f"keep_ratio={self.keep_ratio} is outside (0, 1]: it is the share that is kept "
                f"(compression_ratio, the share removed, is in [0, 1) and here would be {1 - self.keep_ratio:g})"
            )

    def keep(self, seen: list[int], layer: int, num_layers: int) -> list[int]:
        ratio = Fraction(repr(self.keep_ratio))
        return [ceil(ratio * n) for n in seen]


@dataclass(frozen=True)
class Everything(Budget):
    """No limit: the full cache."""

    def keep(self, seen: list[int], layer: int, num_layers: int) -> list[int]:
        return list(seen)

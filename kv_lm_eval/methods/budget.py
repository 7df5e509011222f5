"""HOW MANY slots stay: in integers, so that 0.9 of 100 keeps 90, never 89.

The total is chosen by the setting that names it: `max_capacity_prompt` (slots) or `keep_ratio` / `compression_ratio`
(a share of the tokens seen). `layer_budget` says how layers share it, `head_budget` how the heads of a layer do; both
leave the total as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from typing import ClassVar

import torch

from kv_lm_eval.cache.transfer import to_device
from kv_lm_eval.errors import UserError


@dataclass(frozen=True)
class Budget:
    """How many slots each row of a layer keeps."""

    per_layer: ClassVar[bool] = False  # whether layers have budgets of their own
    least: ClassVar[int] = 1  # slots that a layer keeps in any case

    def keep(
        self, seen: list[int], layer: int, num_layers: int, held: Sequence[float] | None = None, protected: int = 0
    ) -> Sequence[float]:
        """Slots per KV head (their mean) that each row of this layer may keep.

        Args:
            seen: tokens each row has seen. held: slots it holds now. protected: slots the method always keeps.
        """
        raise NotImplementedError

    def by_head(self, seen: int, layer: int) -> list[int] | None:
        """Slots that each KV head keeps of `seen` tokens, where heads have fixed budgets of their own; else None."""
        return None

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

    def keep(
        self, seen: list[int], layer: int, num_layers: int, held: Sequence[float] | None = None, protected: int = 0
    ) -> Sequence[float]:
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

    def keep(
        self, seen: list[int], layer: int, num_layers: int, held: Sequence[float] | None = None, protected: int = 0
    ) -> Sequence[float]:
        return [_ceil_share(self.keep_ratio, n) for n in seen]


@dataclass(frozen=True)
class RatioAbove(Ratio):
    """The same share, of what is held now, and only once more than `prune_after` slots are held.

    Cut at every step this is a bounded cache, whatever the context: between ceil(keep_ratio * (prune_after + 1)) and
    prune_after slots.
    """

    prune_after: int = field(default=0, metadata={"help": "nothing is cut while no more slots than this are held"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune_after < 0:
            raise UserError(f"prune_after={self.prune_after} is negative; it is a number of slots, 0 or more")

    def keep(
        self, seen: list[int], layer: int, num_layers: int, held: Sequence[float] | None = None, protected: int = 0
    ) -> Sequence[float]:
        now = seen if held is None else held
        return [_ceil_share(self.keep_ratio, n) if n > self.prune_after else n for n in now]


@dataclass(frozen=True)
class Pyramid(Budget):
    """Lower layers keep more, upper layers fewer, on average max_capacity_prompt.

    With c = max_capacity_prompt - window: the top layer keeps c // beta and the bottom one 2c minus that, linear
    between, plus the window. The bottom cannot keep more than the prompt has; what it lacks goes to the top. A prompt
    under 2c keeps max_capacity_prompt in every layer.

    Paper: arXiv:2406.02069 (PyramidKV), section 3.2. Reference: KVCache-Factory, pyramidkv_utils.py.
    Deviations: none in the arithmetic. Its integer division leaves the total a little off: at most half a slot a layer
    for each layer, which shows with tiny budgets only.
    """

    per_layer: ClassVar[bool] = True

    max_capacity_prompt: int = field(metadata={"help": "pairs kept per KV head, mean over the layers"})
    beta: int = field(default=20, metadata={"help": "steepness: the top layer keeps about 1/beta of the mean"})

    def __post_init__(self) -> None:
        Slots(self.max_capacity_prompt)
        if self.beta < 1:
            raise UserError(f"beta={self.beta} must be at least 1 (1: every layer keeps the same)")

    def keep(
        self, seen: list[int], layer: int, num_layers: int, held: Sequence[float] | None = None, protected: int = 0
    ) -> Sequence[float]:
        return [self._one(length, layer, num_layers, protected) for length in seen]

    def _one(self, length: int, layer: int, num_layers: int, window: int) -> int:
        scored = self.max_capacity_prompt - window
        if length < 2 * scored or num_layers == 1:
            return self.max_capacity_prompt
        top = scored // self.beta
        bottom = 2 * scored - top
        if bottom >= length - window:
            bottom = length - window
            top = 2 * scored - bottom
        return bottom - layer * ((bottom - top) // (num_layers - 1)) + window

    def check(self, protected: int, method: str) -> None:
        Slots(self.max_capacity_prompt).check(protected, method)


@dataclass(frozen=True)
class PerHead(Budget):
    """A fixed number of slots for each KV head of each layer, given by the method itself."""

    per_layer: ClassVar[bool] = True
    least: ClassVar[int] = 0

    slots: tuple[tuple[int | None, ...], ...] = field(repr=False)  # by layer; None: all tokens

    def by_head(self, seen: int, layer: int) -> list[int]:
        return [seen if most is None else min(seen, most) for most in self.slots[layer]]

    def keep(
        self, seen: list[int], layer: int, num_layers: int, held: Sequence[float] | None = None, protected: int = 0
    ) -> list[float]:
        return [sum(self.by_head(n, layer)) / len(self.slots[layer]) for n in seen]


@dataclass(frozen=True)
class Everything(Budget):
    """No limit: the full cache."""

    def keep(
        self, seen: list[int], layer: int, num_layers: int, held: Sequence[float] | None = None, protected: int = 0
    ) -> Sequence[float]:
        return list(seen)


def _ceil_share(ratio: float, n: float) -> int:
    """ceil(ratio * n) with the ratio as it is written, so that 0.1 is a tenth."""
    return ceil(Fraction(repr(ratio)) * Fraction(n))


@dataclass(frozen=True)
class Heads:
    """How the KV heads of a layer share its slots.

    "uniform": each the same. "ada": those whose tokens score higher keep more. The best tokens of all heads together
    say how many each head would keep; a share `alpha` of an equal part is guaranteed to each.

    Paper: arXiv:2407.11550 (Ada-KV), algorithm 1. Reference: FFY0/AdaKV.
    Deviations: the safeguard is rounded so that the layer's total is exact, rather than per head.
    """

    head_budget: str = field(
        default="uniform",
        metadata={"help": "how the KV heads of a layer share its slots", "choices": ("uniform", "ada")},
    )
    alpha: float = field(default=0.2, metadata={"help": "head_budget=ada: share of an equal part each head is sure of"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha={self.alpha} is outside [0, 1]: it is a share of an equal part")

    def split(self, scores: torch.Tensor, pos: torch.Tensor, keep: list[int]) -> torch.Tensor:
        """Slots per row and head, [B, heads], whose sum over the heads is heads * keep of the row.

        Args:
            scores: [B, heads, N]; pos: [B, 1 or heads, N], -1 where empty; keep: mean slots per head, by row.
        """
        rows, heads, n = scores.shape
        if self.head_budget == "uniform" or heads == 1:
            return torch.tensor(keep).view(-1, 1).expand(rows, heads)
        real = (pos >= 0).expand(rows, heads, n)
        flat = torch.where(real, scores.float(), float("-inf")).reshape(rows, heads * n)
        order = flat.argsort(dim=-1, descending=True, stable=True)
        rank = torch.arange(heads * n, device=order.device)
        chosen = rank < to_device([k * heads for k in keep], order.device).view(-1, 1)
        wanted = torch.zeros(rows, heads, dtype=torch.long, device=order.device)
        wanted.scatter_add_(1, order // n, chosen.long())
        available = real.sum(-1).tolist()
        return torch.tensor(
            [_blend(w, a, k, self.alpha) for w, a, k in zip(wanted.tolist(), available, keep, strict=True)]
        )


def _blend(wanted: list[int], available: list[int], keep: int, alpha: float) -> list[int]:
    """Whole numbers near (1 - alpha) * wanted + alpha * keep, at most `available` each, with the sum len * keep.

    What rounding and full heads leave over goes, one slot at a time, to the head that is furthest below its share; ties
    to the lower head.
    """
    share = Fraction(repr(alpha))
    exact = [(1 - share) * w + share * keep for w in wanted]
    out = [min(int(e), a) for e, a in zip(exact, available, strict=True)]
    missing = min(len(wanted) * keep, sum(available)) - sum(out)
    while missing > 0:
        open_heads = [h for h in range(len(out)) if out[h] < available[h]]
        best = max(open_heads, key=lambda h: (exact[h] - out[h], -h))
        out[best] += 1
        missing -= 1
    return out

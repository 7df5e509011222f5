"""HOW MANY slots stay: in integers, so that 0.9 of 100 keeps 90, never 89.

The total is chosen by the setting that names it: `max_capacity_prompt` (slots) or `keep_ratio` / `compression_ratio`
(a share of the tokens seen). `layer_budget` says how layers share it, `head_budget` how the heads of a layer do; both
leave the total as it is: the mean over the layers that are cut and their heads is the budget, to the slot. Layers that
the model bounds itself (sliding windows) and those of skip_layers are never cut and do not count. With `threshold`
there is no total: a score decides for itself, and every prompt keeps what it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from typing import Any, ClassVar

import torch

from kv_lm_eval.cache.transfer import at_least_float32, to_device
from kv_lm_eval.errors import UserError


def _rounding() -> Any:
    """The setting `rounding`, the same for shares, layers and heads."""
    return field(
        default="exact",
        metadata={
            "help": "exact: budgets are met to the slot; reference: as published code rounds, which may miss them",
            "choices": ("exact", "reference"),
        },
    )


@dataclass(frozen=True)
class Budget:
    """How many slots each row of a layer keeps, as the mean over the layers that share them."""

    least: ClassVar[int] = 1  # slots that a layer keeps in any case
    open: ClassVar[bool] = False  # how many slots stay is known only when they are scored

    def asked(self, seen: Sequence[int], held: Sequence[float], layer: int) -> Sequence[float]:
        """Slots per KV head (their mean) that were asked for, by row; fewer than `least` where a share is that small.

        Args:
            seen: tokens each row has seen. held: slots it holds now.
        """
        raise NotImplementedError

    def by_head(self, seen: int, layer: int) -> list[int] | None:
        """Slots that each KV head keeps of `seen` tokens, where heads have fixed budgets of their own; else None."""
        return None

    def adjusted(self, scores: torch.Tensor, pos: torch.Tensor, seen: Sequence[int]) -> torch.Tensor:
        """Scores [B, 1 or K, N] with +inf for what the budget itself keeps; pos: [B, 1 or K, N], seen: tokens of each
        row."""
        return scores

    def passing(self, scores: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """Where the budget is open: slots that stay, [B, 1 or K] on the host, by their scores [B, 1 or K, N]."""
        raise NotImplementedError

    @property
    def per_layer(self) -> bool:
        """Whether layers have budgets of their own."""
        return False

    def check(self, protected: int, method: str) -> None:
        """Raises UserError where the method's always-kept slots leave no room for a choice."""

    def warnings(self, every: int, protected: int, longest: int | None) -> list[str]:
        """What a user should know of the budget with cuts every so many tokens (0: one), in a model of so many."""
        return []


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

    def asked(self, seen: Sequence[int], held: Sequence[float], layer: int) -> Sequence[float]:
        return [self.max_capacity_prompt] * len(seen)

    def check(self, protected: int, method: str) -> None:
        if protected and self.max_capacity_prompt <= protected:
            raise UserError(
                f"{method} always keeps {protected} slots (its window and sinks), and "
                f"max_capacity_prompt={self.max_capacity_prompt} leaves no room for scored tokens beside them, so it "
                "would equal a plain window; raise max_capacity_prompt or lower window_size."
            )

    def warnings(self, every: int, protected: int, longest: int | None) -> list[str]:
        if longest is None or self.max_capacity_prompt < longest:
            return []
        return [
            f"max_capacity_prompt={self.max_capacity_prompt} is no less than the {longest} positions of the model: "
            "nothing is ever evicted from a prompt that it can take, which is method=full"
        ]


@dataclass(frozen=True)
class Ratio(Budget):
    """A share of the tokens seen so far, rounded down: floor(keep_ratio * tokens), at least one.

    The ratio counts as it is written: 0.9 of 100 is 90. rounding=reference is NVIDIA/kvpress: int(n * (1 - ratio)) in
    binary fractions, where a tenth of 100 is 9.
    """

    keep_ratio: float = field(metadata={"help": "share of the tokens seen that is kept, over 0 and at most 1"})
    rounding: str = _rounding()

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise UserError(
                f"keep_ratio={self.keep_ratio} is outside (0, 1]: it is the share that is kept; compression_ratio, the "
                f"share removed, is in [0, 1) and here would be {1 - self.keep_ratio:g}"
            )

    def asked(self, seen: Sequence[int], held: Sequence[float], layer: int) -> Sequence[float]:
        return [self.share(n) for n in seen]

    def share(self, n: float) -> int:
        """keep_ratio of n slots."""
        if self.rounding == "reference":
            return int(n * (1 - round(1 - self.keep_ratio, 12)))
        return floor(Fraction(repr(self.keep_ratio)) * Fraction(n))

    def warnings(self, every: int, protected: int, longest: int | None) -> list[str]:
        if self.keep_ratio == 1:
            return ["keep_ratio=1 evicts nothing: this is method=full"]
        least = max(protected, self.least)
        if longest is not None and self.share(longest) <= least:
            return [
                f"keep_ratio={self.keep_ratio:g} of the longest prompt of the model ({longest} tokens) is "
                f"{self.share(longest)} slots, and {least} always stay: every prompt keeps those and nothing else, "
                "whatever its share"
            ]
        return []


@dataclass(frozen=True)
class RatioAbove(Ratio):
    """The same share, of what is held now, and only once more than `prune_after` slots are held.

    Cut at every step this is a bounded cache, whatever the context: between floor(keep_ratio * (prune_after + 1)) and
    prune_after slots.
    """

    prune_after: int = field(default=0, metadata={"help": "nothing is cut while no more slots than this are held"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune_after < 0:
            raise UserError(f"prune_after={self.prune_after} is negative; it is a number of slots, 0 or more")

    def asked(self, seen: Sequence[int], held: Sequence[float], layer: int) -> Sequence[float]:
        return [self.share(n) if n > self.prune_after else n for n in held]

    def warnings(self, every: int, protected: int, longest: int | None) -> list[str]:
        if longest is not None and self.prune_after >= longest:
            return [
                f"prune_after={self.prune_after} is no less than the {longest} positions of the model: nothing is ever "
                "evicted from a prompt that it can take, which is method=full"
            ]
        if not every or self.keep_ratio == 1:
            return super().warnings(every, protected, longest)
        share = Fraction(repr(self.keep_ratio))
        settled = max(
            floor(share * every / (1 - share)), protected, self.least
        )  # what a cut leaves of that and `every`
        if settled + every <= self.prune_after:
            return []
        return [
            f"keep_ratio={self.keep_ratio:g} with prune_after={self.prune_after} and compress_every={every} takes its "
            f"share of what is left at every cut, over and over: the cache settles at {settled} slots, however long "
            "the prompt is. A share of the tokens seen is keep_ratio without prune_after"
        ]


@dataclass(frozen=True)
class PerHead(Budget):
    """A fixed number of slots for each KV head of each layer, given by the method itself."""

    least: ClassVar[int] = 0

    slots: tuple[tuple[int | None, ...], ...] = field(repr=False)  # by layer; None: all tokens

    @property
    def per_layer(self) -> bool:
        return True

    def by_head(self, seen: int, layer: int) -> list[int]:
        return [seen if most is None else min(seen, most) for most in self.slots[layer]]

    def asked(self, seen: Sequence[int], held: Sequence[float], layer: int) -> Sequence[float]:
        return [sum(self.by_head(n, layer)) / len(self.slots[layer]) for n in seen]


@dataclass(frozen=True)
class Threshold(Budget):
    """Every slot whose score is at least `threshold`, and the newest tokens whatever their score.

    What a prompt keeps depends on the prompt, by layer and head: heads really hold different numbers of pairs, and
    bytes differ between requests. What is asked in integers, before anything is run, is no more than that nothing goes.

    Reference: NVIDIA/kvpress, dms_press.py (scores below the threshold go once they have left the newest tokens).
    Deviations: all slots held are scored anew at every cut, by scorers that look at more than the token's own vectors.
    """

    open: ClassVar[bool] = True

    threshold: float = field(
        metadata={"help": "pairs that the method scores lower go, however many they are; in the scorer's own unit"}
    )
    threshold_recent: int = field(
        default=128, metadata={"help": "threshold: newest tokens that stay whatever their score"}
    )

    def __post_init__(self) -> None:
        if self.threshold_recent < 0:
            raise UserError(
                f"threshold_recent={self.threshold_recent} is negative; it is a number of tokens, 0 or more"
            )

    def asked(self, seen: Sequence[int], held: Sequence[float], layer: int) -> Sequence[float]:
        return list(held)

    def adjusted(self, scores: torch.Tensor, pos: torch.Tensor, seen: Sequence[int]) -> torch.Tensor:
        """[B, 1 or K, N]: the newest tokens always."""
        first = to_device([n - self.threshold_recent for n in seen], pos.device).view(-1, 1, 1)
        return torch.where((pos >= 0) & (pos >= first), float("inf"), at_least_float32(scores))

    def passing(self, scores: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """[B, 1 or K]: slots that score at least the threshold."""
        return ((scores >= self.threshold) & (pos >= 0)).sum(-1).cpu()


@dataclass(frozen=True)
class Everything(Budget):
    """No limit: the full cache."""

    def asked(self, seen: Sequence[int], held: Sequence[float], layer: int) -> Sequence[float]:
        return list(seen)


@dataclass(frozen=True)
class Layers:
    """How the layers that are cut share the slots.

    "uniform": each the same. "pyramid": lower ones keep more, upper ones fewer, linear between. With the mean m,
    c = m - window of it scored: the bottom keeps c - c // beta more than m, the top as many fewer. A layer and its
    mirror image always differ from m by the same whole number, so that the mean is m whatever their number. Nothing is
    asked of a layer that the prompt does not have: a prompt of m + x tokens is kept whole by the bottom, and the top
    keeps m - x, so that the mean is m for every prompt longer than m, and at every token of a stream. "global": the
    best slots of all layers and heads together stay, m a head on average; a head or a layer may keep nothing. The cut
    waits for the last layer, so that all layers are whole at once.

    Papers: arXiv:2406.02069 (PyramidKV), section 3.2; arXiv:2505.23416 (KVzip) for global. References: KVCache-Factory,
    pyramidkv_utils.py; snu-mllab/KVzip, attention/score.py, which keeps one slot less in all than its share.
    Deviations: the reference rounds the steps between layers down, which keeps more than m (265 for 256), counts layers
    that are never cut, and keeps m in every layer of a prompt under 2c. rounding=reference is its arithmetic.
    """

    layer_budget: str = field(
        default="uniform",
        metadata={"help": "how the layers that are cut share the slots", "choices": ("uniform", "pyramid", "global")},
    )
    beta: int = field(
        default=20, metadata={"help": "layer_budget=pyramid: the top layer keeps about 1/beta of the mean"}
    )
    rounding: str = _rounding()

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise UserError(f"beta={self.beta} must be at least 1 (1: every layer keeps the same)")

    @property
    def differ(self) -> bool:
        """Whether layers have budgets of their own."""
        return self.layer_budget != "uniform"

    @property
    def together(self) -> bool:
        """Whether the slots of all layers are ranked together, so that none is cut before the last one is scored."""
        return self.layer_budget == "global"

    def split(
        self, scores: Sequence[torch.Tensor], pos: Sequence[torch.Tensor], keep: Sequence[int]
    ) -> list[torch.Tensor]:
        """Slots per row and head [B, heads] of each layer, on the host: in all, `keep` a head on average.

        Of equal scores the lower layer's comes first, then the lower head's, then the older token's.

        Args:
            scores: [B, heads, N] of each layer. pos: [B, 1 or heads, N] of each, -1 where empty. keep: by row.
        """
        device = scores[-1].device
        least = torch.finfo(at_least_float32(scores[0]).dtype).min
        layers = [
            torch.where(at >= 0, at_least_float32(own).clamp_min(least), float("-inf"))
            for own, at in zip(scores, pos, strict=True)
        ]
        flat = torch.cat([layer.flatten(1).to(device) for layer in layers], dim=1)
        most = to_device([k * sum(layer.shape[1] for layer in layers) for k in keep], device).view(-1, 1)
        best = torch.arange(flat.shape[1], device=device) < most
        order = flat.argsort(dim=-1, descending=True, stable=True)
        chosen = torch.zeros_like(best).scatter_(1, order, best) & ~flat.isneginf()
        parts = chosen.split([layer[0].numel() for layer in layers], dim=1)
        return [part.view_as(layer).sum(-1).cpu() for part, layer in zip(parts, layers, strict=True)]

    def share(self, mean: int, seen: int, place: int, layers: int, protected: int) -> int:
        """Slots of one of `layers` layers that keep `mean` on average, counted from the bottom.

        Args:
            seen: tokens of the row. protected: slots the method always keeps.
        """
        if self.layer_budget != "pyramid" or layers == 1 or seen <= mean:
            return mean
        if self.rounding == "reference":
            return self._reference(mean, seen, place, layers, protected)
        scored = max(mean - protected, 0)
        more = max(min(scored - scored // self.beta, mean - max(protected, 1), seen - mean), 0)  # at the bottom
        from_middle = layers - 1 - 2 * place
        step = more * abs(from_middle) // (layers - 1)
        return mean + step if from_middle > 0 else mean - step

    def _reference(self, mean: int, seen: int, place: int, layers: int, window: int) -> int:
        scored = mean - window
        if scored <= 0 or seen < 2 * scored:
            return mean
        top = scored // self.beta
        bottom = 2 * scored - top
        if bottom >= seen - window:
            bottom = seen - window
            top = 2 * scored - bottom
        return bottom - place * ((bottom - top) // (layers - 1)) + window


@dataclass(frozen=True)
class Heads:
    """How the KV heads of a layer share its slots.

    "uniform": each the same. "ada": those whose tokens score higher keep more. The best tokens of all heads together
    say how many each head would keep; a share `alpha` of an equal part is guaranteed to each. "ada_floor": that share
    is a floor, not a part of a mean: int(alpha * slots) of each head's best, at least one, then the best of all others.

    Paper: arXiv:2407.11550 (Ada-KV), algorithm 1. References: FFY0/AdaKV for ada; NVIDIA/kvpress, adakv_press.py for
    ada_floor.
    Deviations: the safeguard is rounded so that the layer's total is exact, rather than per head. rounding=reference
    is its arithmetic: of the scored slots c of a head's equal part int(alpha * c) are sure, and each head's number is
    rounded for itself, so that the total may be off by half a slot a head.
    """

    head_budget: str = field(
        default="uniform",
        metadata={"help": "how the KV heads of a layer share its slots", "choices": ("uniform", "ada", "ada_floor")},
    )
    alpha: float = field(
        default=0.2, metadata={"help": "head_budget=ada or ada_floor: share of an equal part each head is sure of"}
    )
    rounding: str = _rounding()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha={self.alpha} is outside [0, 1]: it is a share of an equal part")

    @property
    def differ(self) -> bool:
        """Whether heads have budgets of their own."""
        return self.head_budget != "uniform"

    @property
    def exact(self) -> bool:
        """Whether a layer's heads keep its slots to the last one."""
        return self.head_budget != "ada" or self.rounding == "exact"

    def split(self, scores: torch.Tensor, pos: torch.Tensor, keep: list[int], protected: int = 0) -> torch.Tensor:
        """Slots per row and head, [B, heads], whose sum over the heads is heads * keep of the row.

        Args:
            scores: [B, heads, N]; pos: [B, 1 or heads, N], -1 where empty; keep: mean slots per head, by row.
            protected: slots of each head that the method always keeps.
        """
        rows, heads, n = scores.shape
        if not self.differ or heads == 1:
            return torch.tensor(keep).view(-1, 1).expand(rows, heads)
        real = (pos >= 0).expand(rows, heads, n)
        ranked = torch.where(real, at_least_float32(scores), float("-inf"))
        if self.head_budget == "ada_floor":
            ranked = self._with_floor(ranked, keep)
        order = ranked.reshape(rows, heads * n).argsort(dim=-1, descending=True, stable=True)
        rank = torch.arange(heads * n, device=order.device)
        chosen = rank < to_device([k * heads for k in keep], order.device).view(-1, 1)
        chosen &= real.reshape(rows, heads * n).gather(1, order)
        wanted = torch.zeros(rows, heads, dtype=torch.long, device=order.device)
        wanted.scatter_add_(1, order // n, chosen.long())
        if self.head_budget == "ada_floor":
            return wanted.cpu()
        available = real.sum(-1).tolist()
        rows_of_heads = zip(wanted.tolist(), available, keep, strict=True)
        if self.rounding == "reference":
            return torch.tensor([self._reference(w, a, k, protected) for w, a, k in rows_of_heads])
        return torch.tensor([_blend(w, a, k, self.alpha) for w, a, k in rows_of_heads])

    def _with_floor(self, scores: torch.Tensor, keep: list[int]) -> torch.Tensor:
        """[B, heads, N] scores in which those that each head is sure of come before all others."""
        sure = [max(int(k * self.alpha), 1) if self.alpha and k else 0 for k in keep]  # a float's product, as there
        place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        first = place < to_device(sure, scores.device).view(-1, 1, 1)
        return torch.where(first & ~scores.isneginf(), float("inf"), scores)

    def _reference(self, wanted: list[int], available: list[int], keep: int, protected: int) -> list[int]:
        if sum(available) <= keep * len(available):
            return available
        sure = int((keep - protected) * self.alpha)
        scored = torch.tensor(wanted) - protected
        slots = torch.round(scored * (1 - self.alpha) + sure).int() + protected  # half to even, as there
        return [min(s, a) for s, a in zip(slots.tolist(), available, strict=True)]


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

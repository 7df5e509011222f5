"""How far logits of one model may be apart that were computed in two ways, before it is more than rounding.

A number format alone does not say it. Gemma-3-270M in bfloat16 says something that is 12 % off for a row that stands
alone, of what it says for the same row beside a longer one; SmolLM2-135M 3 %. So where a bound by format is passed, the
model is asked how far it is from itself, and twice that is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch

BOUND = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # relative, by dtype
MOST = 0.5  # allowed at all; a check that allows more would tell nothing


class Rounding:
    """What counts as rounding for one model.

    Args:
        dtype: the model's number format.
        apart: its own logits [n, V] in two ways that should be one, some pairs; asked for where it is needed only.
    """

    def __init__(self, dtype: torch.dtype, apart: Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]) -> None:
        self.bound = BOUND.get(dtype, BOUND[torch.bfloat16])
        self._half = self.bound > BOUND[torch.float32]
        self._apart = apart

    @cached_property
    def own(self) -> float:
        """How far the model is from itself, relative; in formats that leave no room for it 0."""
        if not self._half:
            return 0.0
        found = torch.tensor([self._error(a, b) for a, b in self._apart()]).max().item()  # NaN if one is
        return found if math.isfinite(found) else 0.0

    def beyond(self, expected: torch.Tensor, got: torch.Tensor) -> str | None:
        """How far logits [n, V] are apart, if by more than rounding; else None.

        In half precision one token in four may be off: a mixture of experts can route it elsewhere over a rounding.
        """
        error = self._error(expected, got)
        if error <= self.bound:
            return None
        allowed = max(self.bound, min(2 * self.own, MOST))
        return None if error <= allowed else f"{error:.1e} (relative, allowed {allowed:.1g})"  # NaN is beyond

    def _error(self, a: torch.Tensor, b: torch.Tensor) -> float:
        errors = (a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-9)
        return errors.quantile(0.75 if self._half else 1.0).item() if errors.isfinite().all() else float("nan")

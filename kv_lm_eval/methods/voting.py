"""Scorers by what the last queries look at: these queries' own tokens always stay, and neighbours are pooled.

Shapes: B batch rows, K KV heads, N slots.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting


class Voting(Method):
    """The last window_size queries decide which of the older tokens stay. Subclasses say how, in `score`."""

    window_size: int = setting(32, "observation window: last queries that vote, always kept")
    kernel_size: int = setting(7, "width of the pooling over neighbouring tokens, odd")

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {**super().example(slots), "window_size": min(16, cls.window_size, slots // 2)}

    def validate(self) -> None:
        if self.window_size < 1:
            raise UserError(f"window_size={self.window_size}: there must be at least one query that votes")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            near = f"{max(1, self.kernel_size - 1)} or {max(1, self.kernel_size + 1)}"
            raise UserError(
                f"kernel_size={self.kernel_size} must be odd and positive: an even kernel has no centre and would "
                f"shift the votes by half a token; take {near}"
            )

    @property
    def num_queries(self) -> int:
        return self.window_size

    @property
    def protected(self) -> int:
        return self.window_size

    def weights(self, view: View) -> Tensor:
        """[B, K, N]: attention of the window's queries, summed over these, mean over the query heads of a group."""
        return view.votes(self.window_size)


def pooled(scores: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Scores [B, K, N], each the largest ("max") or the average ("avg", zeros beyond the ends) of its neighbourhood."""
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    kernel = min(kernel_size, 2 * scores.shape[-1] + 1)  # a wider one sees no more
    return pool(scores, kernel, stride=1, padding=kernel // 2)

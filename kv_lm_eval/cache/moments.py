"""Mean and covariance of a layer's queries before their rotary embedding, gathered forward by forward.

Batches are joined by their own means and scatter (Chan et al.), so that nothing cancels in float32.

Shapes: B batch rows, H query heads, q queries, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kv_lm_eval.cache.transfer import at_least_float32


class QueryMoments:
    """Running moments of each row and query head.

    Attributes:
        count: [B] queries so far. mean: [B, H, D]. scatter: [B, H, D, D] sum of outer products about the mean.
    """

    def __init__(self, count: torch.Tensor, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        self.count, self.mean, self.scatter = count, mean, scatter

    @classmethod
    def none_yet(cls, like: torch.Tensor) -> QueryMoments:
        """For queries of the shape of `like`, [B, H, q, D]."""
        b, h, _, d = like.shape
        zeros = at_least_float32(like).new_zeros(b, h, d, d)
        return cls(zeros.new_zeros(b), zeros.new_zeros(b, h, d), zeros)

    def add(self, queries: torch.Tensor, counted: torch.Tensor) -> None:
        """Adds queries [B, H, q, D], float32 or wider; `counted` [B, q] says which of them count."""
        share = counted.to(queries.dtype)
        n = share.sum(1)  # [B]
        mean = (share[:, None, None] @ queries).squeeze(2) / n.clamp_min(1).view(-1, 1, 1)
        about = queries - mean.unsqueeze(2)
        if counted.device.type != "cpu" or not counted.all():  # elsewhere, asking would wait for the device
            about *= share[:, None, :, None]
        total = self.count + n
        step, weight = mean - self.mean, (n / total.clamp_min(1)).view(-1, 1, 1)
        between = (self.count * n / total.clamp_min(1)).view(-1, 1, 1, 1)
        self.scatter = self.scatter + about.transpose(2, 3) @ about + between * step.unsqueeze(3) * step.unsqueeze(2)
        self.mean = self.mean + weight * step
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """[B, H, D, D], divided by the number of queries (not one less); zero where there were none."""
        return self.scatter / self.count.clamp_min(1).view(-1, 1, 1, 1)

    def select(self, rows: torch.Tensor) -> QueryMoments:
        """A copy with the given rows, [R] of them."""
        rows = rows.to(self.count.device)
        return QueryMoments(self.count[rows], self.mean[rows], self.scatter[rows])

    @staticmethod
    def joined(parts: Sequence[QueryMoments]) -> QueryMoments:
        """The rows of all."""
        return QueryMoments(*(torch.cat([getattr(p, name) for p in parts]) for name in ("count", "mean", "scatter")))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.count, self.mean, self.scatter))

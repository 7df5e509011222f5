"""WHAT is chosen: single slots, or whole chunks of neighbours, so that what was said together stays together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kv_lm_eval.cache.transfer import at_least_float32, sum_dtype, to_device
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.budget import _rounding


@dataclass(frozen=True)
class Unit:
    """Slots one by one, or chunks of `unit_size` neighbouring slots, counted from the first one.

    A chunk's score is the mean over its slots of the sum over the heads; a slot that is always kept counts as the
    highest score of its row. So all heads of a layer keep the same chunks. What room is left beside the whole chunks
    that fit goes to the best slots of the next one, so that the budget is met to the slot.

    Paper: arXiv:2502.00299 (ChunkKV), algorithm 1. Reference: NVIDIA/kvpress, presses/chunkkv_press.py.
    Deviations: kvpress keeps a share of the chunks, the last of which may be shorter, and nothing beside them, not even
    what its scorer always keeps: rounding=reference does so, and misses the budget by up to a chunk.
    """

    unit: str = field(
        default="token",
        metadata={"help": "what is kept or goes: single slots, or whole chunks of them", "choices": ("token", "chunk")},
    )
    unit_size: int = field(default=20, metadata={"help": "unit=chunk: neighbouring slots in a chunk"})
    rounding: str = _rounding()

    def __post_init__(self) -> None:
        if self.unit_size < 1:
            raise UserError(f"unit_size={self.unit_size} must be at least 1: it is the number of slots in a chunk")

    @property
    def whole(self) -> bool:
        """Whether neighbours stay or go together."""
        return self.unit == "chunk"

    @property
    def exact(self) -> bool:
        """Whether a row keeps exactly its budget."""
        return not self.whole or self.rounding == "exact"

    def chunks(self, slots: int) -> int:
        """Into how many chunks so many slots are cut."""
        return -(-slots // self.unit_size)

    def ranked(self, scores: torch.Tensor, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores by which the best slots are whole chunks, and the slots of each chunk, the best first.

        Args:
            scores: [B, 1 or K, N]. pos: [B, 1 or K, N], -1 where empty.

        Returns:
            [B, 1, N], +inf where a slot is always kept (none with rounding=reference); [B, chunks] on the device.
        """
        scores, real = at_least_float32(scores), pos[:, :1] >= 0
        always = scores.isposinf() & real
        finite = scores.masked_fill(always | ~real, torch.finfo(scores.dtype).min)
        highest = finite.amax((1, 2), keepdim=True)
        own = torch.where(always, highest, finite).to(sum_dtype(scores.device)).sum(1, keepdim=True)  # [B, 1, N]
        n = own.shape[2]
        place = real.cumsum(-1) - 1  # among the row's pairs
        chunk = torch.where(real, place // self.unit_size, self.chunks(n))  # what is empty is in none
        sums, sizes = (own.new_zeros(*own.shape[:2], self.chunks(n) + 1) for _ in range(2))
        sums.scatter_add_(2, chunk, own.masked_fill(~real, 0.0))
        sizes.scatter_add_(2, chunk, real.to(sizes.dtype))
        mean = torch.where(sizes > 0, sums / sizes.clamp_min(1), float("-inf"))
        mean[..., -1] = float("-inf")
        order = mean.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            2, order, torch.arange(order.shape[2], device=order.device).expand_as(order)
        )
        best = own.argsort(dim=-1, descending=True, stable=True)
        best = best.gather(2, chunk.gather(2, best).argsort(dim=-1, stable=True))  # chunk by chunk, the best first
        within = torch.empty_like(best).scatter_(2, best, torch.arange(n, device=best.device).expand_as(best))
        within = within - chunk * self.unit_size
        out = -(rank.gather(2, chunk) * self.unit_size + within).to(scores.dtype)
        if self.exact:
            out = out.masked_fill(always.any(1, keepdim=True), float("inf"))
        return out, sizes.gather(2, order)[:, 0]

    def counts(self, sizes: torch.Tensor, chunks: Sequence[int]) -> torch.Tensor:
        """Slots of the best so many chunks of each row, [B, 1] on the host; sizes: [B, chunks], the best first."""
        last = to_device(chunks, sizes.device).view(-1, 1) - 1
        return sizes.cumsum(1).gather(1, last.clamp_min(0)).long().cpu()

from __future__ import annotations

import torch
from torch import Tensor

from kv_lm_eval.cache.store import rows_of
from kv_lm_eval.cache.transfer import at_least_float32, sum_dtype
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View, setting
from kv_lm_eval.methods.voting import Voting, pooled


class DropKV(Voting):
    """Tokens without which the last queries would read something else stay: the exact effect of leaving out one pair.

    Without pair j query i would read o_i + p_ij / (1 - p_ij) * (o_i - v_j), with p its attention and o what it reads
    now. The squares of these changes, summed over the window's queries, are a token's score: mean over the query heads
    of a group, averaged over kernel_size neighbours. The window always stays.

    Paper: DropKV (openreview MqfNzH3TVH). Reference: NVIDIA/kvpress, presses/dropkv_press.py (pull request 285).
    Deviations: attention in float32 throughout (kvpress rounds it to the model's format first).
    """

    paper = "openreview:MqfNzH3TVH"

    epsilon: float = setting(1e-6, "added to 1 - p, so that a token with all attention has a score")

    def validate(self) -> None:
        super().validate()
        if self.epsilon <= 0:
            raise UserError(f"epsilon={self.epsilon:g} must be positive: 1 - p may be 0, by which is divided")

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the window always, then the squared changes, pooled over neighbours."""
        there = (view.pos >= 0).unsqueeze(-1)
        values = at_least_float32(view.values)
        mean = values.masked_fill(~there, 0.0).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp_min(1)
        values = values - mean  # of what all have in common, a difference of values says nothing
        weights = view.attention(self.window_size)  # [B, K, G, W, N]
        group, weights = weights.shape[2], weights.flatten(2, 3)
        read = weights @ values
        share = (1 + self.epsilon - weights).reciprocal_().mul_(weights).square_()
        top = weights.argmax(
            -1
        )  # of each query the token that it reads most, perhaps alone: |v - o| is 0 then, or nearly
        of_top = share.gather(3, top.unsqueeze(3)).squeeze(3) * (rows_of(values, top) - read).square().sum(-1)
        share.scatter_(3, top.unsqueeze(3), 0.0)
        squares = read.square().sum(-1, keepdim=True)
        sums = share.transpose(2, 3) @ torch.cat([read, squares, torch.ones_like(squares)], dim=-1)  # [B, K, N, D + 2]
        twice = 2 * (sums[..., :-2] * values).sum(-1)
        changes = (sums[..., -2] - twice + sums[..., -1] * values.square().sum(-1)).clamp_min(0.0)
        wide = changes.to(sum_dtype(changes.device)).scatter_add_(2, top, of_top.to(sum_dtype(changes.device)))
        mean = (wide / group).to(changes.dtype).masked_fill(view.pos < 0, 0.0)
        return pooled(mean, self.kernel_size, "avg").masked_fill(view.recent(self.window_size), float("inf"))

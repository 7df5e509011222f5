from __future__ import annotations

from torch import Tensor

from kv_lm_eval.cache.transfer import at_least_float32
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
        values = at_least_float32(view.values).unsqueeze(2)  # [B, K, 1, N, D]
        weights = view.attention(self.window_size)  # [B, K, G, W, N]
        read = weights @ values
        share = (weights / (1 - weights + self.epsilon)).square()
        apart = read.square().sum(-1, keepdim=True) - 2 * (read @ values.transpose(3, 4))  # |v - o|^2 - |v|^2
        changes = share.mul_((apart + values.square().sum(-1).unsqueeze(3)).clamp_min(0.0)).sum(3)
        mean = changes.mean(2).masked_fill(view.pos < 0, 0.0)
        return pooled(mean, self.kernel_size, "avg").masked_fill(view.recent(self.window_size), float("inf"))

from __future__ import annotations

import torch
from torch import Tensor

from kv_lm_eval.cache.transfer import at_least_float32, to_device
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting

MOST_AHEAD = 2**17
BLOCK = 512  # keys multiplied with the covariances of a group at a time


class ExpectedAttention(Method):
    """Tokens stay to which queries yet to come should attend, if they are like the prompt's but further on.

    Queries before their rotary embedding are taken as normal, with mean m and covariance C of those seen so far. Turned
    by the mean rotation over the next positions, they give every key k the expected weight exp(k m s + k C k s^2 / 2),
    s the scaling of the logits, normalised over the keys; times the norm of its value that is its score.

    Paper: arXiv:2510.00636, section 3. Reference: NVIDIA/kvpress, presses/expected_attention_press.py.
    Deviations: none in the scores (the mean rotation, not the mean over rotations; C divided by n; weights normalised
    per query head over the keys after the sinks, then averaged over the group). kvpress computes in the model's number
    format, refuses GPT-NeoX, counts padding as queries and ends at the prompt; here it is float32, any rotary model,
    real tokens only, and with compress_every the queries of the answer count too. A softcap of the logits is ignored.
    """

    paper = "arXiv:2510.00636"

    n_sink: int = setting(4, "first tokens that always stay and whose queries do not count")
    n_future_positions: int = setting(512, "positions ahead over which the rotation is averaged")
    epsilon: float = setting(0.0, "added to the expected weight before it is multiplied by the value's norm")

    def validate(self) -> None:
        if self.n_sink < 0:
            raise UserError(f"n_sink={self.n_sink} is negative; 0 lets every token compete and every query count")
        if self.n_future_positions < 1:
            raise UserError(f"n_future_positions={self.n_future_positions}: at least one future query is needed")
        if self.n_future_positions > MOST_AHEAD:
            raise UserError(
                f"n_future_positions={self.n_future_positions}: the rotation of each is computed, at most {MOST_AHEAD}"
            )
        if self.epsilon < 0:
            raise UserError(f"epsilon={self.epsilon} is negative: a larger value would lower a token's score")

    @property
    def protected(self) -> int:
        return self.n_sink

    @property
    def moments_from(self) -> int:
        return self.n_sink

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the sinks always, then expected weight times norm of the value."""
        first, keys = view.first(self.n_sink), at_least_float32(view.keys)
        mean, covariance = self._normal(view)
        logits = view.scaling * mean @ keys.transpose(2, 3)  # [B, K, G, N]
        covariance = (view.scaling**2 / 2 * covariance).transpose(2, 3).flatten(3)  # [B, K, D, G D]
        for block, into in zip(keys.split(BLOCK, dim=2), logits.split(BLOCK, dim=3), strict=True):
            turned = (block @ covariance).unflatten(3, (logits.shape[2], -1))  # [B, K, n, G, D]
            into += (turned @ block.unsqueeze(4)).squeeze(4).transpose(2, 3)
        if view.bias is not None:
            logits = logits + view.bias.unsqueeze(2)
        hidden = (first | (view.pos < 0)).unsqueeze(2)
        weights = logits.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1).mean(2)
        return ((weights + self.epsilon) * at_least_float32(view.values).norm(dim=-1)).masked_fill(first, float("inf"))

    def _normal(self, view: View) -> tuple[Tensor, Tensor]:
        """Mean [B, K, G, D] and covariance [B, K, G, D, D] of the queries to come: m turned, and R C R', R the mean
        rotation: its rows are turned, then its columns."""
        both = torch.cat([view.moments.mean.unsqueeze(2), view.moments.covariance], dim=2)
        turned, groups = self._ahead(view, both), (view.keys.shape[1], -1)
        covariance = self._ahead(view, turned[:, :, 1:].transpose(2, 3))
        return turned[:, :, 0].unflatten(1, groups), covariance.unflatten(1, groups)

    def _ahead(self, view: View, x: Tensor) -> Tensor:
        """[B, H, n, D] vectors at position 0, turned by the mean rotation over the positions to come."""
        start = to_device(view.seen, x.device).unsqueeze(1)
        return view.rotate(x, start, self.n_future_positions)

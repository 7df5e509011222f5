from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kv_lm_eval.cache.transfer import at_least_float32
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting


class LagKV(Method):
    """Tokens that stand out against the tokens that follow them stay: no attention, no queries.

    The slots after the sinks are cut into partitions of lag_size. Keys and values of a partition are scaled by the
    minimum and maximum of the next one, per channel; the standard deviation over the channels, softmaxed over the
    partition, is a token's score, the sum of its key's and its value's. Tokens are ranked within their partition, so
    that every partition keeps the same share. The last partition and what is left over are preferred, newest first.

    Paper: arXiv:2504.04704, section 2. Reference: NVIDIA/kvpress, presses/lagkv_press.py.
    Deviations: a budget too small for the last partition keeps its newest tokens; a cache too short for two
    partitions keeps the newest tokens. After a cut, partitions are of the slots that are left.
    """

    paper = "arXiv:2504.04704"

    n_sink: int = setting(4, "first tokens that always stay")
    lag_size: int = setting(128, "tokens in a partition")

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {**super().example(slots), "lag_size": slots // 4}

    def validate(self) -> None:
        if self.n_sink < 0 or self.lag_size < 1:
            raise UserError(f"n_sink={self.n_sink} must be 0 or more and lag_size={self.lag_size} at least 1 token")

    @property
    def protected(self) -> int:
        return self.n_sink

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the sinks always, then the newest, then the ranks within each partition, from -1 down."""
        b, k, n, _ = view.keys.shape
        scores = torch.arange(n, device=view.keys.device).repeat(b, k, 1).float()  # what is not ranked: newest first
        empty = (view.pos < 0).expand(b, k, n).sum(-1).tolist()  # slots that come before a row's first token
        for row in range(b):
            for head in range(k):
                start = empty[row][head] + self.n_sink
                scores[row, head, :start] = float("inf")
                parts = (n - start) // self.lag_size
                if parts >= 2:
                    stop = start + parts * self.lag_size
                    keys, values = view.keys[row, head, start:stop], view.values[row, head, start:stop]
                    standing_out = self._standing_out(keys, parts) + self._standing_out(values, parts)
                    place = standing_out.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # 0: the best
                    scores[row, head, start : stop - self.lag_size] = -1.0 - place.flatten().float()
        return scores

    def _standing_out(self, x: Tensor, parts: int) -> Tensor:
        """[parts * lag_size, D] -> [parts - 1, lag_size]: how much each token differs from the next partition."""
        x = at_least_float32(x).view(parts, self.lag_size, -1)
        low, high = x[1:].min(1, keepdim=True).values, x[1:].max(1, keepdim=True).values
        return ((x[:-1] - low) / (high - low).clamp_min(1e-9)).std(-1).softmax(-1)

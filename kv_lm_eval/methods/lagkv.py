from __future__ import annotations

from math import sqrt
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
        empty = (view.pos < 0).expand(b, k, n).sum(-1)  # slots that come before a row's first token
        for count in empty.unique().tolist():
            alike = empty == count
            everything = bool(alike.all())
            start = count + self.n_sink
            parts = (n - start) // self.lag_size
            own = scores.flatten(0, 1) if everything else scores[alike]  # [heads, N]
            own[:, :start] = float("inf")
            if parts >= 2:
                stop = start + parts * self.lag_size
                pairs = (
                    x[:, :, start:stop].flatten(0, 1) if everything else x[alike][:, start:stop]
                    for x in (view.keys, view.values)
                )
                keys, values = (self._standing_out(x.unflatten(1, (parts, -1))) for x in pairs)
                place = (keys + values).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # 0: the best
                own[:, start : stop - self.lag_size] = -1.0 - place.flatten(1).float()
            if not everything:
                scores[alike] = own
        return scores

    def _standing_out(self, x: Tensor) -> Tensor:
        """[heads, parts, lag_size, D] -> [heads, parts - 1, lag_size]: how much each token differs from the next
        partition."""
        x = at_least_float32(x)
        low, high = x[:, 1:].amin(2, keepdim=True), x[:, 1:].amax(2, keepdim=True)
        scaled = (x[:, :-1] - low).div_((high - low).clamp_min(1e-9))
        about = scaled.sub_(scaled.mean(-1, keepdim=True))
        return (torch.linalg.vector_norm(about, dim=-1) / sqrt(x.shape[-1] - 1)).softmax(-1)

from __future__ import annotations

from torch import Tensor

from kv_lm_eval.cache.transfer import to_device
from kv_lm_eval.methods.base import Method, View


class ObservedAttention(Method):
    """Tokens that got most attention from the queries that could see them, on average: H2O by means, not by sums.

    No token is protected, and recent ones, which few queries saw, are not worse off for it.

    Paper: arXiv:2306.14048 (H2O) for the sum. Reference: NVIDIA/kvpress, presses/observed_attention_press.py.
    Deviations: none in the scores; attention is summed in blocks, in float32 (kvpress has all of it at once). With
    later cuts a token's mean goes on over the queries of the answer.
    """

    paper = "arXiv:2306.14048"
    accumulates = True
    slotwise = True
    evicts_in_prefill = True

    def weights(self, view: View) -> Tensor:
        """[B, K, N]: attention received from all queries."""
        return view.mass

    def score(self, view: View) -> Tensor:
        """[B, K, N]: attention received, divided by the number of queries from the token's own on."""
        seen = to_device(view.seen, view.pos.device).view(-1, 1, 1)
        return view.mass / (seen - view.pos).clamp_min(1)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kv_lm_eval.cache.transfer import to_device
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting

SCORE = 0.5  # between what stays and what goes


class SimLayer(Method):
    """Lazy layers keep first and recent tokens only, the others everything: which are lazy, each prompt shows.

    A layer is lazy for a row whose last query gives more than lazy_threshold of its attention, mean over all query
    heads, to the first n_sink tokens and the newest window_size. It then keeps the first ones and the newest
    window_size - 1, so that with the next token it has a window again. Shorter prompts are kept whole. How many pairs
    that leaves depends on the prompt; the budget is a threshold between those that stay and those that go.

    Paper: arXiv:2410.13846 (SimLayerKV). Reference: NVIDIA/kvpress, presses/simlayerkv_press.py (n_last=1, the decoding
    variant of the authors), where n_sink is n_initial and window_size n_recent.
    Deviations: each row by itself (kvpress takes the mean over the batch). With later cuts a layer may become lazy, and
    a lazy one is cut to its window again.
    """

    paper = "arXiv:2410.13846"
    presets = {"threshold": SCORE, "threshold_recent": 0}
    takes_budget = False

    lazy_threshold: float = setting(0.9, "share of the last query's attention over which a layer is lazy")
    n_sink: int = setting(4, "first tokens that a lazy layer keeps")
    window_size: int = setting(1024, "tokens before the last one whose attention counts; a lazy layer keeps one less")

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {"n_sink": 2, "window_size": slots - 1, "lazy_threshold": 0.5}

    def validate(self) -> None:
        if not 0 <= self.lazy_threshold <= 1:
            raise UserError(f"lazy_threshold={self.lazy_threshold:g} is outside [0, 1]: it is a share of attention")
        if self.n_sink < 0 or self.window_size < 1:
            raise UserError(
                f"n_sink={self.n_sink} must be 0 or more and window_size={self.window_size} at least 1 token"
            )

    @property
    def num_queries(self) -> int:
        return 1

    @property
    def heads_alike(self) -> bool:
        return True

    @property
    def without_effect(self) -> dict[str, str]:
        fixed = "which tokens stay is fixed by lazy_threshold, n_sink and window_size"
        names = ("max_capacity_prompt", "keep_ratio", "compression_ratio", "prune_after", "threshold")
        return dict.fromkeys((*names, "threshold_recent", "layer_budget", "beta", "head_budget", "alpha"), fixed)

    def weights(self, view: View) -> Tensor:
        """[B, K, N]: the last query's attention, mean over the query heads of a group."""
        return view.votes(1)

    def score(self, view: View) -> Tensor:
        """[B, 1, N]: 1 for what stays, 0 for what goes."""
        near = view.first(self.n_sink) | (view.recent(self.window_size + 1) & ~view.recent(1))
        given = (self.weights(view).mean(1, keepdim=True) * near[:, :1]).sum(-1, keepdim=True)  # [B, 1, 1]
        long = to_device([n > self.n_sink + self.window_size + 1 for n in view.seen], given.device).view(-1, 1, 1)
        stays = view.first(self.n_sink)[:, :1] | view.recent(self.window_size - 1)[:, :1]
        given = given.clamp_max(1.0)  # all of it is no more than all, whatever the rounding
        return torch.where((given > self.lazy_threshold) & long & ~stays, 0.0, 1.0)

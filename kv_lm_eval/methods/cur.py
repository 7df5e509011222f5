from __future__ import annotations

import torch
from torch import Tensor

from kv_lm_eval.cache.transfer import at_least_float32, sum_dtype
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting


class CUR(Method):
    """Tokens whose key and value are long beside their neighbours' stay: approximate leverage scores, no attention.

    The squared norms of keys, and of values, are each divided by their sum over windows of local_window_size tokens;
    their product (or the one or the other, or their mean) is the score, divided by its sum over all tokens.

    Paper: arXiv:2509.15038 (CurDKV), section 4. Reference: NVIDIA/kvpress, presses/cur_press.py.
    Deviations: none in the scores; the random projection that the paper may put before the norms is left out. Windows
    are counted from the first token; after a cut they are of the slots that are left.
    """

    paper = "arXiv:2509.15038"

    n_sink: int = setting(4, "first tokens that always stay")
    leverage_type: str = setting("kv_product", "whose norms make the score", ("kv_product", "kv_avg", "key", "value"))
    local_window_size: int = setting(16, "tokens over which squared norms are shares of their sum; 0: not shares")

    def validate(self) -> None:
        if self.n_sink < 0 or self.local_window_size < 0:
            raise UserError(
                f"n_sink={self.n_sink} and local_window_size={self.local_window_size} are numbers of tokens, 0 or more"
            )

    @property
    def protected(self) -> int:
        return self.n_sink

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the sinks always, then the shares of squared norms."""
        real = view.pos >= 0
        keys, values = (self._shares(at_least_float32(x).square().sum(-1), real) for x in (view.keys, view.values))
        if self.leverage_type in ("key", "value"):
            scores = keys if self.leverage_type == "key" else values
        else:
            scores = keys * values if self.leverage_type == "kv_product" else (keys + values) / 2
        total = scores.masked_fill(~real, 0.0).sum(-1, keepdim=True)
        return (scores / total.clamp_min(torch.finfo(scores.dtype).tiny)).masked_fill(
            view.first(self.n_sink), torch.inf
        )

    def _shares(self, squares: Tensor, real: Tensor) -> Tensor:
        """[B, K, N]: each number as a share of the sum over its window; real [B, 1 or K, N]: slots that hold a pair."""
        if not self.local_window_size:
            return squares
        place = (real.cumsum(-1) - 1).clamp_min(0).expand_as(squares)  # among the pairs of its head
        window = place // self.local_window_size
        own = squares.masked_fill(~real, 0.0)
        wide = own.to(sum_dtype(own.device))  # a GPU adds in any order, which must not show
        sums = torch.zeros_like(wide).scatter_add_(2, window, wide).gather(2, window)
        return own / sums.to(own.dtype).clamp_min(torch.finfo(own.dtype).tiny)

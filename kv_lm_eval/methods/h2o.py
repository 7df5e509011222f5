from __future__ import annotations

from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting


class H2O(Method):
    """Heavy hitters: tokens with the largest attention summed over all queries so far, and the most recent tokens.

    Paper: arXiv:2306.14048, algorithm 1. Reference: FMInference/H2O, h2o_hf/utils_hh.
    Deviations: the prompt is one full-attention forward whose attention is summed in blocks (memory grows with the
    length, not with its square) and one cut after it, then a cut every compress_every tokens; the original simulates
    a cut after every prompt token too. One choice per KV head, by the mean over its query heads.
    compress_every=0 is the prefill-only form of KVCache-Factory.
    """

    paper = "arXiv:2306.14048"
    presets = {"compress_every": 1}
    accumulates = True
    slotwise = True
    evicts_in_prefill = True

    window_size: int | None = setting(None, "most recent tokens always kept; default half of the budget, as published")

    def validate(self) -> None:
        if self.window_size is not None and self.window_size < 0:
            raise UserError(f"window_size={self.window_size} is negative; 0 keeps heavy hitters only")

    @property
    def protected(self) -> int:
        return self.window_size or 0

    @property
    def reads_budget(self) -> bool:
        return self.window_size is None

    def weights(self, view: View) -> Tensor:
        """[B, K, N]: attention received from all queries."""
        return view.mass

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the newest always, then the attention received so far."""
        recent = [keep // 2 for keep in view.keep] if self.window_size is None else self.window_size
        return view.mass.masked_fill(view.recent(recent), float("inf"))

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting

if TYPE_CHECKING:
    from kv_lm_eval.cache.facts import ModelFacts


class Knorm(Method):
    """Keys with the smallest L2 norm stay: a low norm goes with high attention, without looking at attention.

    Paper: arXiv:2406.11430 (A Simple and Effective L2 Norm-Based Strategy). Reference: alessiodevoto/l2compress.
    Deviations: one compression after the prefill by default, as in the paper's prefill experiments and kvpress;
    compress_every=1 with prune_after is the
    per-step variant (a bounded cache, see RatioAbove in budget.py), in which an unprotected newest token, whose norm is
    high, is often the first to go. Norms are compared to 4e-5 relative: in the first layer the norm of a key
    depends on its token alone, so that repeated tokens would otherwise be ranked by the rounding of their rotation;
    here they tie, and ties go to the older one.
    """

    paper = "arXiv:2406.11430"
    slotwise = True
    evicts_in_prefill = True

    recent_protected: int = setting(0, "most recent tokens that always stay")

    def validate(self) -> None:
        if self.recent_protected < 0:
            raise UserError(f"recent_protected={self.recent_protected} is negative; 0 protects none")

    @property
    def protected(self) -> int:
        return self.recent_protected

    def warnings(self, facts: ModelFacts) -> list[str]:
        if facts.qk_norm:
            return [
                "knorm on a model with query/key normalisation: the norm of a key is fixed by that "
                "layer's weight up to "
                "rounding, so the choice of tokens says next to nothing about their importance."
            ]
        return []

    def score(self, view: View) -> Tensor:
        scores = -(view.keys.float().norm(dim=-1).log2() * 2**14).round()
        return scores.masked_fill(view.recent(self.recent_protected), float("inf"))

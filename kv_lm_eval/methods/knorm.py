from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
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
    high, is often the first to go. Norms are those of the keys held, computed in float64. Only where two tokens have
    one value and one key but for rounding (repeated tokens in the first layer, where both depend on the token alone and
    the key on its rotation) does the older one stay, rather than the one that rounding favours.
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
        return (-key_norms(view)).masked_fill(view.recent(self.recent_protected), float("inf"))


def key_norms(view: View) -> Tensor:
    """L2 norms of the keys, [B, K, N]; the same number for tokens of one value whose norms differ by rounding only.

    A rotation leaves the norm of a key as it is, up to rounding, and the value alone. So tokens next to each other in
    order of their values' norms are one where neither of the two norms differs by more than rounding.
    """
    exact = torch.float32 if view.keys.device.type == "mps" else torch.float64
    keys, values = (torch.linalg.vector_norm(x, dim=-1, dtype=exact) for x in (view.keys, view.values))
    eps = torch.finfo(view.keys.dtype).eps
    values, order = values.masked_fill(view.pos < 0, float("nan")).sort(dim=-1)
    ordered = keys.gather(2, order)
    same = _close(values, min(16 * eps, 2**-14)) & _close(ordered, min(16 * eps, 2**-9))
    group = F.pad((~same).cumsum(-1), (1, 0))
    least = torch.full_like(ordered, float("inf")).scatter_reduce(2, group, ordered, "amin")
    return torch.empty_like(keys).scatter_(2, order, least.gather(2, group))


def _close(x: Tensor, share: float) -> Tensor:
    """Whether each number of [B, K, N] and the next differ by no more than a share of them: [B, K, N - 1]."""
    return (x[..., 1:] - x[..., :-1]).abs() <= share * x[..., 1:]

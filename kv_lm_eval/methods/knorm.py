from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kv_lm_eval.cache.transfer import sum_dtype
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting

if TYPE_CHECKING:
    from kv_lm_eval.cache.facts import ModelFacts


class Knorm(Method):
    """Keys with the smallest L2 norm stay: a low norm goes with high attention, without looking at attention.

    Paper: arXiv:2406.11430 (A Simple and Effective L2 Norm-Based Strategy). Reference: alessiodevoto/l2compress.
    Deviations: one compression after the prefill by default, as in the paper's prefill experiments and kvpress;
    compress_every=1 with prune_after is the per-step variant (a bounded cache, see RatioAbove in budget.py), in which
    an unprotected newest token, whose norm is high, is often the first to go. Norms are those of the keys held,
    computed in float64. Only where two tokens have one value and one key but for rounding (repeated tokens in the first
    layer, where both depend on the token alone and the key on its rotation) does the older one stay, rather than the
    one that rounding favours.
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
                "knorm on a model with query/key normalisation: the norm of a key is fixed by that layer's weight up "
                "to rounding, so the choice of tokens says next to nothing about their importance."
            ]
        return []

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the smallest norms, each KV head for itself."""
        return (-key_norms(view)).masked_fill(view.recent(self.recent_protected), float("inf"))


def key_norms(view: View) -> Tensor:
    """L2 norms of the keys, [B, K, N]; the same number for tokens of one value whose norms differ by rounding only.

    A rotation leaves the norm of a key as it is, up to rounding, and the value alone. So two tokens are one where their
    values look the same (in length and in two directions), and the norms of their keys too, up to rounding.
    """
    keys = torch.linalg.vector_norm(view.keys, dim=-1, dtype=sum_dtype(view.keys.device))
    length, *marks = _marks(view.values)
    eps = torch.finfo(view.keys.dtype).eps
    length, order = length.masked_fill(view.pos < 0, float("nan")).sort(dim=-1)
    in_order = keys.gather(2, order)
    same = _close(in_order, in_order, min(16 * eps, 2**-7))
    for mark in (length, *(x.gather(2, order) for x in marks)):
        same &= _close(mark, length, min(16 * eps, 2**-9))
    if keys.device.type == "cpu" and not same.any():  # elsewhere it would have to be waited for
        return keys
    group = F.pad((~same).cumsum(-1), (1, 0))
    least = torch.full_like(keys, float("inf")).scatter_reduce(2, group, in_order, "amin")
    return torch.empty_like(keys).scatter_(2, order, least.gather(2, group))


def _marks(values: Tensor) -> tuple[Tensor, ...]:
    """Three numbers that tell values [B, K, N, D] apart, [B, K, N] each, the first their lengths."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    place = torch.arange(values.shape[-1], device=values.device, dtype=values.dtype)
    directions = torch.stack([place.cos(), (2.5 * place).cos()], dim=-1)
    return values.norm(dim=-1), *(values @ directions).unbind(-1)


def _close(x: Tensor, length: Tensor, share: float) -> Tensor:
    """Whether each number of x [B, K, N] and the next differ by no more than a share of a length: [B, K, N - 1]."""
    return (x[..., 1:] - x[..., :-1]).abs() <= share * length[..., 1:]

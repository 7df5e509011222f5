from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from kv_lm_eval.cache.transfer import at_least_float32, to_device
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import base
from kv_lm_eval.methods.base import Method, View, setting

SNAPKV = "snapkv"


class CriticalKV(Method):
    """Half of the budget by the scores of any scorer, the rest by these times what values weigh behind the output.

    With n slots of a head, the first_stage_ratio * n best by the scorer stay. The others are taken by
    (score + norm_epsilon) times the L1 norm of the token's value behind the layer's output projection, mean over the
    query heads of its group: attention to a value that the projection makes small changes little. scorer=NAME (or
    path/to/file.py:Class) says which; its settings are given beside, and its schedule is kept. With head_budget=ada
    heads share the slots by the scorer's own scores, as published (Ada with CriticalKV).

    Paper: arXiv:2502.03805, algorithm 1. Reference: NVIDIA/kvpress, presses/criticalkv_press.py.
    Deviations: what the scorer always keeps counts to the first stage and stays in any case (kvpress gives a window the
    best score and may drop it in the second stage). Scorers with negative scores are refused, since a large norm would
    lower them; kvpress multiplies all the same. The projection of every value costs as much as that of every token does
    in the prefill.
    """

    paper = "arXiv:2502.03805"
    slotwise = False  # the second stage depends on what the first one left
    projects = True

    scorer: str = setting(SNAPKV, "method whose scores are taken, by name or path/to/file.py:Class")
    first_stage_ratio: float = setting(0.5, "share of a head's slots that the scorer alone fills")
    norm_epsilon: float = setting(1e-4, "added to a score before it is multiplied by the norm of the projected value")

    @classmethod
    def around(cls, settings: Mapping[str, Any]) -> type[Method]:
        return _around(str(settings.get("scorer") or SNAPKV))

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.first_stage_ratio <= 1:
            raise UserError(
                f"first_stage_ratio={self.first_stage_ratio:g} is outside [0, 1]: it is the share of the slots "
                "that the scorer fills alone"
            )
        if self.norm_epsilon < 0:
            raise UserError(f"norm_epsilon={self.norm_epsilon:g} is negative: a larger norm would lower a score")

    def rescore(self, view: View, scores: Tensor, counts: Tensor) -> Tensor:
        """[B, K, N]: +inf for the best by the scorer, the others by their score times the projected norm."""
        scores = at_least_float32(scores)
        real = (view.pos >= 0).expand(-1, max(view.pos.shape[1], scores.shape[1]), -1)
        if bool((scores.masked_fill(view.pos < 0, 0.0) < 0).any()):
            raise UserError(
                f"method=criticalkv,scorer={self.scorer}: it gives negative scores, which a large norm would lower "
                f"when they are multiplied by it; take a scorer of attention (snapkv, tova, h2o), or "
                f"method={self.scorer} alone"
            )
        order = torch.where(real, scores, float("-inf")).argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        first = to_device([[int(n * self.first_stage_ratio) for n in row] for row in counts.tolist()], order.device)
        second = (scores + self.norm_epsilon) * view.output_norms()
        return second.masked_fill((rank < first.unsqueeze(-1)) | scores.isposinf(), float("inf"))


@functools.cache
def _around(scorer: str) -> type[Method]:
    """CriticalKV around that scorer: its settings, its scores and what they read, with the second stage on top."""
    try:
        inner = base.load(scorer)
    except UserError as error:
        raise UserError(
            f"scorer={scorer}: {str(error).removeprefix(f'method={scorer} ').removeprefix('is ')}"
        ) from None
    why = None
    if issubclass(inner, CriticalKV):
        why = "is this method itself"
    elif not inner.compresses:
        why = "evicts nothing"
    elif inner.ring or not inner.takes_budget or "sinks_and_recent" in vars(inner):
        why = "keeps tokens by their place, and gives no scores to choose by"
    elif same := sorted({f.name for f in fields(inner)} & {f.name for f in fields(CriticalKV)}):
        why = f"has a setting {same[0]}, as method=criticalkv has"
    if why is not None:
        raise UserError(f"scorer={scorer} {why}; method=criticalkv wraps scorers such as {SNAPKV}, h2o, tova")
    own = {"__doc__": CriticalKV.__doc__, "__module__": CriticalKV.__module__, "paper": CriticalKV.paper}
    made: type[Method] = type(CriticalKV.__name__, (CriticalKV, inner), {**own, "name": "criticalkv"})
    return made

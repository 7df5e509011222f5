from __future__ import annotations

from dataclasses import dataclass, field
from math import e

import torch
from torch.nn.functional import normalize

from kv_lm_eval.cache.store import Kept
from kv_lm_eval.cache.transfer import at_least_float32, sum_dtype
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View
from kv_lm_eval.methods.evicted import Evicted, choose, gather, split

ELEMENTS = 2**24  # similarities computed at a time


@dataclass(frozen=True)
class D2O(Evicted):
    """Evicted pairs that resemble a kept one are merged into it, the others are dropped.

    The nearest kept key by cosine similarity u is the partner. Pairs with u of at least a threshold are merged, keys
    and values alike, by weights exp(u) / (e + sum of exp(u)) and e / (e + sum of exp(u)) for the partner itself. The
    threshold is the mean of u over the evicted at a head's first cut, from then on a moving average of these means.

    Paper: arXiv:2406.13035 (D2O), the token level (4.2.2). Reference: AIoT-MLSys-Lab/D2O@2092325,
    LLM_merge_new/kv_token_merge/modify_llama_merge.py.
    Deviations: the layer level (budgets by attention density) is not part of it; any scorer and budget will do. Weights
    are the paper's (its code averages u * k over the merged, and k of the partner); a threshold for each KV head, where
    the code filters by the mean over heads, with threshold_ema=0.5. The code also leaves layers 0 and 1 whole
    (skip_layers=[0,1] here) and always keeps the first 4 tokens, which no setting here adds to a scorer that does not.
    """

    threshold_ema: float = field(
        default=0.7, metadata={"help": "weight of a cut's own mean similarity in the threshold, the rest is the past's"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.threshold_ema <= 1:
            raise UserError(
                f"threshold_ema={self.threshold_ema} is outside (0, 1]: it is the weight of the newest mean similarity"
            )

    def check(self, method: Method) -> None:
        if method.in_cache_sinks:
            raise UserError(
                "evicted=d2o merges keys into the sinks, which positions=in_cache rewrites from their first form at "
                "every cut, so that merged keys would be lost; use positions=absolute"
            )

    def cut(self, method: Method, view: View, scores: torch.Tensor, counts: torch.Tensor) -> Kept:
        """The counts [B, 1 or K] best slots by scores [B, 1 or K, N]; pairs [B, K, M, D] are merged with the rest."""
        index, valid = choose(scores, view.pos, counts)
        kept = gather(view, index, valid)
        _, gone = split(view, index, valid)
        valid = valid.expand(-1, gone.shape[1], -1)
        nearest, partner = _nearest(view.keys, kept.keys, valid)
        number = gone.sum(-1)
        mean = nearest.masked_fill(~gone, 0.0).sum(-1) / number.clamp_min(1)  # [B, K]
        if view.memory is None:
            threshold = mean.masked_fill(number == 0, float("-inf"))  # minus infinity: nothing was evicted yet
        else:
            moved = self.threshold_ema * mean + (1 - self.threshold_ema) * view.memory
            threshold = torch.where(view.memory.isneginf(), mean, moved)
            threshold = torch.where(number == 0, view.memory, threshold)
        merged = gone & (nearest >= threshold.unsqueeze(-1))
        # A GPU adds in any order, which must not show.
        wide = sum_dtype(nearest.device)
        weight = nearest.to(wide).exp().masked_fill(~merged, 0.0)
        total = weight.new_zeros(valid.shape).scatter_add_(2, partner, weight).unsqueeze(-1)
        for name, old in (("keys", view.keys), ("values", view.values)):
            own: torch.Tensor = getattr(kept, name)
            where = partner.unsqueeze(-1).expand_as(old)
            summed = (e * own.to(wide)).scatter_add_(2, where, weight.unsqueeze(-1) * old)
            setattr(kept, name, torch.where(total > 0, summed / (e + total), own.to(wide)).to(own.dtype))
        kept.memory = threshold
        return kept


def _nearest(keys: torch.Tensor, kept: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each key [B, K, N, D] the largest cosine similarity with a kept key [B, K, M, D], and that one's index."""
    ours, theirs = normalize(at_least_float32(keys), dim=-1), normalize(at_least_float32(kept), dim=-1)
    block = max(1, ELEMENTS // valid.numel())
    found = [
        (part @ theirs.transpose(2, 3)).masked_fill(~valid.unsqueeze(2), -2.0).max(-1) for part in ours.split(block, 2)
    ]
    return torch.cat([f.values for f in found], dim=2), torch.cat([f.indices for f in found], dim=2)

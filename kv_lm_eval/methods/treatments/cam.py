from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from kv_lm_eval.cache.store import Kept
from kv_lm_eval.cache.transfer import sum_dtype
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View
from kv_lm_eval.methods.evicted import Evicted, choose, gather, needs_weights, split
from kv_lm_eval.methods.random_ import position_hash


@dataclass(frozen=True)
class CaM(Evicted):
    """Cache merging: the value of an evicted token may be spread over the values of the next kept tokens.

    An evicted token that had as much attention as those tokens have on average is merged for sure, one that had half as
    much in half of the cases: each of the next merge_size kept values gets 1 / merge_size of its value. Keys stay as
    they are, and with them where attention goes.

    Paper: Zhang et al., CaM: Cache Merging for Memory-efficient LLMs Inference, ICML 2024 (openreview LCTmppB165).
    Reference: zyxxmu/cam, local_cam_mask of each model.
    Deviations: any scorer may say what is evicted (the original evicts the token that leaves the recent window) and all
    tokens that a cut evicts are merged at once, each with its own value as it was. The coin is a hash of (merge_seed,
    layer, head, position) instead of a draw. The average is over the tokens that receive; the original's models differ:
    the mean or the maximum over sinks and window, a draw or a ratio over 1. Attention is what the scorer knows (its
    window's, or accumulated).
    """

    merge_size: int = field(default=32, metadata={"help": "kept tokens that share the value of an evicted one"})
    merge_seed: int = field(default=0, metadata={"help": "another seed, other coins"})

    def __post_init__(self) -> None:
        if self.merge_size < 1:
            raise UserError(f"merge_size={self.merge_size}: a value is spread over at least 1 token; or evicted=drop")

    def check(self, method: Method) -> None:
        needs_weights(method, "evicted=cam compares", "use evicted=d2o, which compares keys")

    def cut(self, method: Method, view: View, scores: torch.Tensor, counts: torch.Tensor) -> Kept:
        """The counts [B, 1 or K] best slots by scores [B, 1 or K, N]; values [B, K, M, D] have shares of the rest."""
        weights = method.weights(view)
        assert weights is not None
        index, valid = choose(scores, view.pos, counts)
        kept = gather(view, index, valid)
        stays, gone = split(view, index, valid)
        b, k, n = stays.shape
        slots = index.shape[2]
        size = min(self.merge_size, slots)  # no token has more kept ones after it
        empty = slots - stays.sum(-1, keepdim=True)
        after = empty + stays.cumsum(-1)  # [B, K, N] the first kept slot that follows each old one
        received = F.pad(weights.gather(2, index.expand(b, k, slots)) * valid, (0, size)).unfold(2, size, 1).sum(-1)
        receivers = (slots - after).clamp(1, size)
        ratio = weights * receivers / received.gather(2, after).clamp_min(torch.finfo(torch.float32).tiny)
        merged = gone & (position_hash(view, self.merge_seed) / 2**24 < ratio) & (after < slots)
        if not merged.any():
            return kept
        # A GPU adds in any order, which must not show.
        share = (view.values.to(sum_dtype(view.values.device)) / self.merge_size).masked_fill(
            ~merged.unsqueeze(-1), 0.0
        )
        total = share.new_zeros(b, k, slots + size, share.shape[3])
        for step in range(size):
            total.scatter_add_(2, (after + step).unsqueeze(-1).expand_as(share), share)
        kept.values = (kept.values + total[:, :, :slots]).to(kept.values.dtype)
        return kept

from __future__ import annotations

import torch
from torch import Tensor

from kv_lm_eval.cache.transfer import to_device
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View, levelled, setting
from kv_lm_eval.methods.snapkv import SnapKV
from kv_lm_eval.methods.voting import pooled


class DefensiveKV(SnapKV):
    """The worst case of the window's votes: what any query of any head of a group attended to may matter again.

    Votes are pooled query by query, and scaled to the attention that the query gave; the largest over a group's query
    heads and the window's queries counts, and never less than the mean of these over the tokens (a token that nobody
    looked at may be needed too). That times the L1 norm of the token's value behind the output projection, as a share
    of the same over the KV heads, is the score; heads share the layer's slots by it (head_budget=ada, alpha=0). Tokens
    with the most attention on average, up to first_stage_mass of it, stay before all others.

    Paper: arXiv:2510.13334 (DefensiveKV), section 4. Reference: FFY0/DefensiveKV, efficient_defensivekv_press.py.
    Deviations: one row at a time, where the reference takes means and maxima over the batch. As there, the attention
    that the window_size tokens before the window had is taken off first_stage_mass.
    """

    paper = "arXiv:2510.13334"
    presets = {"head_budget": "ada", "alpha": 0}
    projects = True

    kernel_size: int = setting(5, "width of the pooling over neighbouring tokens, odd")
    pooling: str = setting("avg", "how votes are pooled", ("max", "avg"))
    first_stage_mass: float = setting(0.9, "share of the attention whose tokens, the most attended first, always stay")

    @property
    def reads_budget(self) -> bool:
        return True

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.first_stage_mass <= 1:
            raise UserError(f"first_stage_mass={self.first_stage_mass:g} is outside [0, 1]: it is a share of attention")

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the window always, then the most attended, then the worst case times what values weigh."""
        recent = view.recent(self.window_size)
        old = (view.pos >= 0) & ~recent
        votes = view.attention(self.window_size) * old[:, :, None, None]  # [B, K, G, W, N]
        tiny = torch.finfo(votes.dtype).tiny
        near = pooled(votes.flatten(1, 3), self.kernel_size, self.pooling).view(votes.shape) * old[:, :, None, None]
        near = near / near.sum(-1, keepdim=True).clamp_min(tiny) * votes.sum(-1, keepdim=True)
        worst = near.amax((2, 3))
        mean = worst.sum(-1, keepdim=True) / old.sum(-1, keepdim=True).clamp_min(1)
        norms = view.output_norms()
        scores = worst.maximum(mean) * norms / summed_over_heads(norms, view.pos).clamp_min(tiny)
        scores = levelled(scores.masked_fill(~old, 0.0))
        first = self._first_stage(view, votes, old)
        return torch.where(first, scores.amax((1, 2), keepdim=True), scores).masked_fill(recent, float("inf"))

    def _first_stage(self, view: View, votes: Tensor, old: Tensor) -> Tensor:
        """[B, K, N]: the most attended tokens, as long as those before them have less than the share that counts.

        Args:
            votes: [B, K, G, W, N] attention of the window's queries to what is before it. old: [B, 1 or K, N] that.
        """
        before = old & ~_ends(old, self.window_size)
        share = self.first_stage_mass - (votes.sum(-1) - (votes * before[:, :, None, None]).sum(-1)).mean((1, 2, 3))
        average = votes.mean((2, 3))
        average = average / average.sum(-1, keepdim=True).clamp_min(torch.finfo(votes.dtype).tiny)
        value, order = average.sort(dim=-1, descending=True, stable=True)
        count = (value.cumsum(-1) < share.view(-1, 1, 1)).sum(-1, keepdim=True)  # those that do not reach it together
        most = to_device([keep - self.window_size for keep in view.keep], count.device).view(-1, 1, 1)
        rank = torch.empty_like(order).scatter_(
            2, order, torch.arange(order.shape[2], device=order.device).expand_as(order)
        )
        return rank < count.minimum(most)


def summed_over_heads(numbers: Tensor, pos: Tensor) -> Tensor:
    """Numbers [B, K, N] of tokens, each summed over the heads that hold the token, [B, 1 or K, N]; pos: [B, 1 or K, N],
    in order, -1 where empty."""
    if pos.shape[1] == 1:
        return numbers.sum(1, keepdim=True)
    every, total = pos.flatten(1).contiguous(), torch.zeros_like(numbers)
    for head in range(pos.shape[1]):
        own = pos[:, head].contiguous()
        at = torch.searchsorted(own, every).clamp_max(own.shape[1] - 1)
        there = (own.gather(1, at) == every) & (every >= 0)
        total += torch.where(there, numbers[:, head].gather(1, at), 0.0).view(total.shape)
    return total


def _ends(there: Tensor, count: int) -> Tensor:
    """[B, heads, N]: the last so many of the slots that are there."""
    left = there.flip(-1).cumsum(-1).flip(-1)
    return there & (left <= count)

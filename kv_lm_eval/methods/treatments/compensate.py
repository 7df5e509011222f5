from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kv_lm_eval.cache.store import Kept, rows_of
from kv_lm_eval.cache.transfer import at_least_float32, sum_dtype
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View
from kv_lm_eval.methods.evicted import Evicted, needs_weights


@dataclass(frozen=True)
class Compensate(Evicted):
    """Compensation tokens: blocks of evicted pairs live on as one averaged pair each, inside the budget.

    The tokens that are not always kept are cut into blocks. Each block costs one slot, which holds the average of those
    of its pairs that were not kept, weighted by the attention they got; the other slots go to the best tokens as
    before. Where there are more blocks than slots, only the averages of the heaviest blocks are held.

    weight=uniform with count_bias=log_n is the compensation token of RazorAttention: n pairs as one whose weight in
    the softmax is n times that of a single pair. Where all pairs of a block are the same nothing is lost then.

    Paper: arXiv:2407.15891 (RazorAttention), its compensation token, for count_bias and weight=uniform.
    Reference: raetselhaftesKEN/SnapKV@3e98f87, snapkv_utils.py (block compensation).
    Deviations: per KV head unless the method chooses per query head; in float32 without the original's 1e-8 (0 in half
    precision). An average takes the position of its block's last token, which only orders the slots; with
    key_space=pre_rope the whole number next to the mean position, at which its key really stands, so that a later cut
    can turn it back. Averages of rotated keys (post_rope) shrink, the more the longer the block. At a later cut an
    average is a pair like any other, or with log_n as many pairs as it stands for.
    """

    block_size: str = field(default="256", metadata={"help": "tokens in a block, or full: one block for all"})
    empty_block: str = field(
        default="zero",
        metadata={
            "help": "for a block all of whose tokens were kept: zero, a pair of zeros, which takes attention, as in "
            "the original (none with count_bias=log_n); drop, its slot goes to the next best token",
            "choices": ("zero", "drop"),
        },
    )
    weight: str = field(
        default="attn",
        metadata={"help": "weights of the average: attention received, or equal", "choices": ("attn", "uniform")},
    )
    count_bias: str = field(
        default="none",
        metadata={
            "help": "log_n: an average of n pairs weighs as n pairs in the softmax; none: as one, as in the original",
            "choices": ("none", "log_n"),
        },
    )
    key_space: str = field(
        default="post_rope",
        metadata={
            "help": "average keys as they are (post_rope), or turned back to position 0 and then forth to the mean "
            "position (pre_rope), so that they do not shrink",
            "choices": ("post_rope", "pre_rope"),
        },
    )

    def __post_init__(self) -> None:
        if self.block_size != "full" and (not self.block_size.isdigit() or int(self.block_size) < 1):
            raise UserError(f"block_size={self.block_size} must be a number of tokens, at least 1, or full")

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {"block_size": slots}

    @property
    def moves_keys(self) -> tuple[str, str] | None:
        return ("key_space=pre_rope", "key_space=post_rope") if self.key_space == "pre_rope" else None

    def check(self, method: Method) -> None:
        if self.weight == "attn":
            needs_weights(method, "evicted=compensate,weight=attn averages by", "use weight=uniform")

    def cut(self, method: Method, view: View, scores: torch.Tensor, counts: torch.Tensor) -> Kept:
        """The best slots by scores [B, 1 or K, N] and averages of the rest, counts [B, 1 or K] of both, M the most."""
        b, k, n, _ = view.keys.shape
        each = torch.ones(b, k, n, device=view.keys.device) if view.bias is None else view.bias.exp()
        weights = method.weights(view) if self.weight == "attn" else each  # each: pairs that a slot stands for
        assert weights is not None
        pos, scores, counts = view.pos.expand(b, k, n), at_least_float32(scores).expand(b, k, n), counts.expand(b, k)
        heads = [
            [self._head(scores[i, j], pos[i, j], weights[i, j], int(counts[i, j])) for j in range(k)] for i in range(b)
        ]
        most, size = (max(block.shape[x] for row in heads for _, block, _ in row) for x in (0, 1))
        members = pos.new_zeros(b, k, most, size, dtype=torch.long)  # of every average
        parts = torch.zeros(b, k, most, size, device=pos.device)  # their weights, which add up to 1; 0: not in it
        average_pos = pos.new_zeros(b, k, most)
        length = max(len(stays) + len(block) for row in heads for stays, block, _ in row)
        index = torch.zeros(b, k, length, dtype=torch.long, device=pos.device)  # old slots, then n + the averages
        new_pos = pos.new_full((b, k, length), -1)  # empty slots first
        old_slots = torch.zeros_like(index)
        for i, row in enumerate(heads):
            for j, (stays, block, part) in enumerate(row):
                members[i, j, : len(block), : block.shape[1]] = block.clamp_min(0)
                parts[i, j, : len(block), : block.shape[1]] = part
                was = torch.cat([stays, block.max(1).values])  # an average takes the place of its block's last token
                place = pos[i, j, was]
                if self.key_space == "pre_rope" and len(block):
                    wide = part.to(sum_dtype(part.device))
                    mean = (wide * pos[i, j, block.clamp_min(0)]).sum(1).round().to(place.dtype)
                    place[len(stays) :] = torch.where(part.sum(1) > 0, mean, place[len(stays) :])
                average_pos[i, j, : len(block)] = place[len(stays) :]
                slots = torch.cat([stays, n + torch.arange(len(block), device=pos.device)])
                order, first = place.argsort(stable=True), length - len(slots)  # of one position, what stays is first
                index[i, j, first:], new_pos[i, j, first:] = slots[order], place[order]
                old_slots[i, j, first:] = was[order]

        def means(x: torch.Tensor) -> torch.Tensor:
            """[B, K, blocks, D], averages of x [B, K, N, D]."""
            each_member = at_least_float32(rows_of(x, members.flatten(2))) * parts.flatten(2).unsqueeze(-1)
            return each_member.view(b, k, most, size, x.shape[3]).sum(3)

        def beside(x: torch.Tensor, averages: torch.Tensor) -> torch.Tensor:
            """x [B, K, N, D] and averages [B, K, blocks, D] in the new slots."""
            return rows_of(torch.cat([x, averages.to(x.dtype)], 2), index)

        def sums(x: torch.Tensor) -> torch.Tensor:
            """x [B, K, N] in the new slots, summed over what an average stands for."""
            total = (x.gather(2, members.flatten(2)).view(members.shape) * (parts > 0)).sum(3)
            return torch.cat([x, total], 2).gather(2, index)

        if self.key_space == "pre_rope":
            turned_back = view.rotate(at_least_float32(view.keys), -view.pos.clamp_min(0))
            mean_keys = view.rotate(means(turned_back), average_pos)
        else:
            mean_keys = means(view.keys)
        keys, values = beside(view.keys, mean_keys), beside(view.values, means(view.values))
        bias = sums(each).log().masked_fill(new_pos < 0, 0.0) if self.count_bias == "log_n" else None
        mass = None if view._mass is None else sums(view._mass)
        return Kept(keys, values, new_pos, mass, bias, slots=old_slots)

    def _head(
        self, scores: torch.Tensor, pos: torch.Tensor, weights: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One row and head, each argument [N].

        Returns:
            the slots that stay [m]; the slots of every block that gets an average [blocks, size], -1 where it has
            fewer; the weight of each in the average, 0 for those that stay.
        """
        real = (pos >= 0).nonzero().squeeze(1)
        always = real[scores[real].isposinf()]
        old = real[~scores[real].isposinf()]
        if len(real) <= count:
            return real, old.new_zeros(0, 1), weights.new_zeros(0, 1)
        size = len(old) if self.block_size == "full" else min(int(self.block_size), len(old))
        padded = old.new_full((-(-len(old) // size), size), -1)
        padded.view(-1)[: len(old)] = old
        tokens, chosen = self._tokens_and_blocks(scores[old], weights[old], size, count - len(always))
        stays, blocks = torch.cat([old[tokens], always]).sort().values, padded[chosen]
        evicted = weights.clone()
        evicted[stays] = 0
        part = torch.where(blocks >= 0, evicted[blocks.clamp_min(0)], 0.0)
        return stays, blocks, part / part.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    def _tokens_and_blocks(
        self, scores: torch.Tensor, weights: torch.Tensor, size: int, room: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens are kept as they are, and which blocks get an average, in `room` slots; scores and weights are
        those of the tokens that may go."""
        block = torch.arange(len(scores), device=scores.device) // size
        blocks = int(block[-1]) + 1
        if room <= blocks:
            heaviness = torch.stack([w.sum() for w in weights.split(size)])
            heaviest = heaviness.argsort(descending=True, stable=True)[:room]
            return block[:0], heaviest.sort().values
        best = scores.argsort(descending=True, stable=True)
        kept, chosen = room - blocks, torch.arange(blocks, device=scores.device)
        if self.empty_block == "drop":  # as many tokens as fit beside the blocks that are not wholly kept
            place = torch.arange(1, len(best) + 1, device=best.device)
            last = torch.zeros_like(chosen).scatter_reduce(0, block[best], place, "amax")  # wholly kept from so many on
            tokens = torch.arange(room + 1, device=best.device)
            left = blocks - torch.searchsorted(last.sort().values, tokens, right=True)
            kept = int((tokens + left <= room).nonzero().max())
            chosen = (last > kept).nonzero().squeeze(1)
        return best[:kept], chosen

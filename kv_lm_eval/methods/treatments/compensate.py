from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kv_lm_eval.cache.store import Kept
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

    @property
    def moves_keys(self) -> tuple[str, str] | None:
        return ("key_space=pre_rope", "key_space=post_rope") if self.key_space == "pre_rope" else None

    def check(self, method: Method) -> None:
        if self.weight == "attn":
            needs_weights(method, "evicted=compensate,weight=attn averages by", "use weight=uniform")

    def cut(self, method: Method, view: View, scores: torch.Tensor, counts: torch.Tensor) -> Kept:
        b, k, n, d = view.keys.shape
        each = torch.ones(b, k, n, device=view.keys.device) if view.bias is None else view.bias.exp()
        weights = method.weights(view) if self.weight == "attn" else each  # each: pairs that a slot stands for
        assert weights is not None
        pos, scores, counts = view.pos.expand(b, k, n), scores.float().expand(b, k, n), counts.expand(b, k)
        heads = [
            [self._head(scores[i, j], pos[i, j], weights[i, j], int(counts[i, j])) for j in range(k)] for i in range(b)
        ]
        length = max(len(slots) for row in heads for slots, _, _ in row)
        shares = weights.new_zeros(b, k, length, n)  # of every old pair in each new one; empty slots first
        new_pos = pos.new_full((b, k, length), -1)
        average = torch.zeros(b, k, length, dtype=torch.bool, device=pos.device)
        for i, row in enumerate(heads):
            for j, (slots, share, averaged) in enumerate(row):
                place = pos[i, j, slots]
                if self.key_space == "pre_rope":
                    mean = (share.double() @ pos[i, j].double()).round().to(place.dtype)
                    place = torch.where(averaged & (share.sum(1) > 0), mean, place)
                order, first = place.argsort(stable=True), length - len(slots)
                shares[i, j, first:], new_pos[i, j, first:] = share[order], place[order]
                average[i, j, first:] = averaged[order]
        keys, values = shares @ view.keys.float(), shares @ view.values.float()
        if self.key_space == "pre_rope":
            unturned = shares @ view.rotate(view.keys.float(), -view.pos.clamp_min(0))
            turned = view.rotate(unturned, new_pos.clamp_min(0))
            keys = torch.where(average.unsqueeze(-1), turned, keys)
        summed = (shares > 0).float()
        mass = None if view.mass is None else (summed @ view.mass.unsqueeze(-1)).squeeze(-1)
        bias = None
        if self.count_bias == "log_n":
            bias = (summed @ each.unsqueeze(-1)).squeeze(-1).log().masked_fill(new_pos < 0, 0.0)
        return Kept(keys.to(view.keys.dtype), values.to(view.values.dtype), new_pos, mass, bias)

    def _head(
        self, scores: torch.Tensor, pos: torch.Tensor, weights: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One row and head, each argument [N].

        Returns:
            its new slots [m], each named by the old slot whose position it takes; the share of every old pair in each,
            [m, N], one for a kept token, weights that add up to one for an average; which of them are averages, [m].
        """
        real = (pos >= 0).nonzero().squeeze(1)
        always = real[scores[real].isposinf()]
        old = real[~scores[real].isposinf()]
        if len(real) <= count:
            tokens, blocks = old, list[torch.Tensor]()
        else:
            tokens, blocks = self._tokens_and_blocks(old, scores[old], weights[old], count - len(always))
        stays = torch.cat([tokens, always])
        shares = torch.zeros(len(stays) + len(blocks), len(pos), device=pos.device)
        shares[torch.arange(len(stays)), stays] = 1
        gone = torch.ones(len(pos), device=pos.device)
        gone[stays] = 0
        for i, block in enumerate(blocks, len(stays)):
            part = weights[block] * gone[block]
            shares[i, block] = part / part.sum().clamp_min(torch.finfo(torch.float32).tiny)
        slots = torch.cat([stays, *(block[-1:] for block in blocks)])
        return slots, shares, torch.arange(len(slots), device=pos.device) >= len(stays)

    def _tokens_and_blocks(
        self, old: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor, room: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Which old slots are kept as they are, and which blocks of old slots get an average, in `room` slots."""
        size = len(old) if self.block_size == "full" else int(self.block_size)
        blocks = list(old.split(size))
        best = scores.argsort(descending=True, stable=True)
        if room <= len(blocks):
            heaviness = torch.stack([w.sum() for w in weights.split(size)])
            heaviest = heaviness.argsort(descending=True, stable=True)[:room]
            return old[:0], [blocks[i] for i in sorted(heaviest.tolist())]
        kept = room - len(blocks)
        if self.empty_block == "drop":
            in_block = torch.arange(len(old), device=old.device) // size
            sizes = torch.bincount(in_block)
            for kept in range(room, -1, -1):  # as many tokens as fit beside the blocks that are not wholly kept
                left = (torch.bincount(in_block[best[:kept]], minlength=len(sizes)) < sizes).nonzero().squeeze(1)
                if kept + len(left) <= room:
                    blocks = [blocks[i] for i in left.tolist()]
                    break
        return old[best[:kept]], blocks

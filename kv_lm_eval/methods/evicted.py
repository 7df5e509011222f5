"""What becomes of the REST: the pairs that were not kept.

Shapes: B batch rows, K KV heads, N slots before the cut, M slots after it, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kv_lm_eval.cache.store import Kept
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View


@dataclass(frozen=True)
class Evicted:
    """Treatment of the evicted pairs: what a layer holds after a cut."""

    evicted: str = field(
        default="drop",
        metadata={"help": "what becomes of the pairs that are not kept", "choices": ("drop", "compensate")},
    )

    def check(self, method: Method) -> None:
        """Raises UserError where the treatment needs what the method does not have."""

    def cut(self, method: Method, view: View, scores: torch.Tensor, counts: torch.Tensor) -> Kept:
        """The slots that the layer holds from now on.

        Args:
            view: all slots before the cut. scores: [B, 1 or K, N], +inf: always kept.
            counts: [B, 1 or K] slots to keep per row and head, on the host.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Drop(Evicted):
    """Evicted pairs are gone: the treatment of nearly all published methods."""

    def cut(self, method: Method, view: View, scores: torch.Tensor, counts: torch.Tensor) -> Kept:
        return gather(view, *choose(scores, view.pos, counts))


@dataclass(frozen=True)
class Compensate(Evicted):
    """Compensation tokens: blocks of evicted pairs live on as one averaged pair each, inside the budget.

    The tokens that are not always kept are cut into blocks. Each block costs one slot, which holds the average of those
    of its pairs that were not kept, weighted by the attention they got; the other slots go to the best tokens as
    before. Where there are more blocks than slots, only the averages of the heaviest blocks are held.

    Reference: raetselhaftesKEN/SnapKV@3e98f87, snapkv_utils.py (block compensation).
    Deviations: per KV head instead of per query head; in float32 without the original's 1e-8 (0 in half precision); an
    average takes the position of its block's last token, which only orders the slots. Averages of rotated keys shrink,
    the more the longer the block.
    """

    block_size: str = field(default="256", metadata={"help": "tokens in a block, or full: one block for all"})
    empty_block: str = field(
        default="zero",
        metadata={
            "help": "for a block all of whose tokens were kept: zero, a pair of zeros, which takes attention, as in "
            "the original; drop, its slot goes to the next best token",
            "choices": ("zero", "drop"),
        },
    )
    weight: str = field(
        default="attn",
        metadata={"help": "weights of the average: attention received, or equal", "choices": ("attn", "uniform")},
    )

    def __post_init__(self) -> None:
        if self.block_size != "full" and (not self.block_size.isdigit() or int(self.block_size) < 1):
            raise UserError(f"block_size={self.block_size} must be a number of tokens, at least 1, or full")

    def check(self, method: Method) -> None:
        if self.weight == "attn" and type(method).weights is Method.weights:
            raise UserError(
                "evicted=compensate,weight=attn averages by the attention that tokens received, which "
                f"{method.name} does not look at; use weight=uniform"
            )

    def cut(self, method: Method, view: View, scores: torch.Tensor, counts: torch.Tensor) -> Kept:
        b, k, n, _ = view.keys.shape
        weights = method.weights(view) if self.weight == "attn" else torch.ones(b, k, n, device=view.keys.device)
        assert weights is not None
        mass = torch.zeros(b, k, n, device=view.keys.device) if view.mass is None else view.mass
        pos, scores, counts = view.pos.expand(b, k, n), scores.float().expand(b, k, n), counts.expand(b, k)
        ones = [
            [self._head(scores[i, j], pos[i, j], weights[i, j], int(counts[i, j])) for j in range(k)] for i in range(b)
        ]
        length = max(len(slots) for row in ones for slots, _ in row)
        keys = view.keys.new_zeros(b, k, length, view.keys.shape[3])
        values = view.values.new_zeros(b, k, length, view.values.shape[3])
        kept = Kept(keys, values, pos.new_full((b, k, length), -1), mass.new_zeros(b, k, length))
        for i, row in enumerate(ones):
            for j, (slots, share) in enumerate(row):
                first = length - len(slots)
                kept.pos[i, j, first:] = pos[i, j, slots]
                for new, old in ((keys, view.keys), (values, view.values)):
                    new[i, j, first:] = (share @ old[i, j].float()).to(new.dtype)
                kept.mass[i, j, first:] = (share > 0).float() @ mass[i, j]  # type: ignore[index]
        return kept if view.mass is not None else Kept(keys, values, kept.pos, None)

    def _head(
        self, scores: torch.Tensor, pos: torch.Tensor, weights: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One row and head, each argument [N].

        Returns:
            its new slots [m], each named by the old slot whose position it takes, and the share of every old pair in
            each, [m, N]: one for a kept token, weights that add up to one for an average.
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
        order = pos[slots].argsort(stable=True)
        return slots[order], shares[order]

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


def choose(scores: torch.Tensor, pos: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots with the highest scores, in order of position.

    Args:
        scores: [B, 1 or K, N]. pos: [B, 1 or K, N], -1 where empty.
        keep: [B, 1 or K] slots per row and head, on the host.

    Returns:
        index, valid: [B, heads, M] with M = max(keep); rows and heads that keep fewer have their empty entries first.
        Ties go to the older token, so the choice does not depend on the batch, the device or the sort's mood.
    """
    smallest = torch.finfo(torch.float32).min
    scores = scores.float()
    scores = torch.where(pos >= 0, scores.clamp_min(smallest), float("-inf"))
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., : int(keep.max())]
    rank = torch.arange(order.shape[-1], device=order.device)
    valid = (rank < keep.to(order.device).unsqueeze(-1)).expand_as(order)
    index = torch.where(valid, order, -1).sort(dim=-1).values
    return index.clamp_min(0), index >= 0


def gather(view: View, index: torch.Tensor, valid: torch.Tensor) -> Kept:
    """The slots of a view at index [B, 1 or K, M]; entries that are not valid become empty."""
    heads = max(view.pos.shape[1], index.shape[1])
    pos = view.pos.expand(-1, heads, -1).gather(2, index.expand(-1, heads, -1))
    pos = torch.where(valid.expand(-1, heads, -1), pos, -1)
    per_head = index.expand(-1, view.keys.shape[1], -1)
    wide = per_head.unsqueeze(-1)
    keys = view.keys.gather(2, wide.expand(-1, -1, -1, view.keys.shape[3]))
    values = view.values.gather(2, wide.expand(-1, -1, -1, view.values.shape[3]))
    return Kept(keys, values, pos, None if view.mass is None else view.mass.gather(2, per_head))

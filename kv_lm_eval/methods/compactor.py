from __future__ import annotations

from typing import Any

from torch import Tensor

from kv_lm_eval.cache.transfer import to_device
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting
from kv_lm_eval.methods.leverage import check_sketch, leverage
from kv_lm_eval.methods.non_causal import NEIGHBOURS, weighted_attention
from kv_lm_eval.methods.voting import pooled


class Compactor(Method):
    """Keys that stand out and tokens that their chunk attends to, together; no question is needed.

    blending * z(leverage) + z(attention within chunks): see leverage and non_causal, over the tokens between the first
    sink_size_start and the last sink_size_end, which always stay; z centres and scales over a layer's tokens and heads.
    blending is by default the share of the tokens that goes.

    Paper: arXiv:2507.08143, section 3. Reference: NVIDIA/kvpress, presses/compactor_press.py, by the paper's author.
    Deviations: those of leverage (a random matrix that can be repeated) and non_causal. z is of each row; blending is 1
    less the budget's share of the row's tokens, to the slot (kvpress: the ratio as given). As in kvpress and the
    authors' engine logits are not scaled.
    """

    paper = "arXiv:2507.08143"
    every_query = True
    rotates = True

    sink_size_start: int = setting(8, "first tokens that always stay")
    sink_size_end: int = setting(4, "most recent tokens that always stay")
    chunk_size: int = setting(256, "tokens that attend to each other, counted after the first ones")
    sketch_dimension: int = setting(48, "columns of the random matrix; no fewer than a key has channels: none is used")
    blending: float | None = setting(None, "weight of leverage beside attention; None: the share that goes")
    seed: int = setting(0, "another seed, another random matrix")

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        few = {"sink_size_start": 2, "sink_size_end": 2} if slots <= 16 else {}
        return {**super().example(slots), **few, "chunk_size": 64}

    def validate(self) -> None:
        if self.sink_size_start < 0 or self.sink_size_end < 0:
            raise UserError(
                f"sink_size_start={self.sink_size_start} and sink_size_end={self.sink_size_end} are numbers of tokens, "
                "0 or more"
            )
        if self.chunk_size < 1:
            raise UserError(f"chunk_size={self.chunk_size} must be at least 1: a token attends to itself at least")
        if self.blending is not None and self.blending < 0:
            raise UserError(f"blending={self.blending:g} is negative: keys that stand out would go first")
        check_sketch(self.sketch_dimension)

    @property
    def num_queries(self) -> int:
        return self.chunk_size + self.sink_size_end

    @property
    def reads_budget(self) -> bool:
        return self.blending is None

    @property
    def protected(self) -> int:
        return self.sink_size_start + self.sink_size_end

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the first and the last tokens always, then leverage and attention."""
        always = view.first(self.sink_size_start) | view.recent(self.sink_size_end)
        counts = (view.pos >= 0) & ~always
        received = weighted_attention(view, self.chunk_size, counts, self.sink_size_start, self.sink_size_end)
        attention = _standard(pooled(received, NEIGHBOURS, "avg"), counts)
        geometry = _standard(leverage(view, self.sketch_dimension, self.seed, counts), counts)
        return (self._weight(view) * geometry + attention).masked_fill(always, float("inf"))

    def _weight(self, view: View) -> Tensor | float:
        if self.blending is not None:
            return self.blending
        share = [1 - keep / seen for keep, seen in zip(view.keep, view.seen, strict=True)]
        return to_device(share, view.keys.device).view(-1, 1, 1)


def _standard(scores: Tensor, counts: Tensor) -> Tensor:
    """[B, K, N] less their mean and over their standard deviation, over what counts in all heads of a row."""
    there = counts.expand_as(scores)
    number = there.sum((1, 2), keepdim=True)
    mean = scores.masked_fill(~there, 0.0).sum((1, 2), keepdim=True) / number.clamp_min(1)
    squares = (scores - mean).masked_fill(~there, 0.0).square().sum((1, 2), keepdim=True)
    return (scores - mean) / (squares / (number - 1).clamp_min(1)).sqrt().clamp_min(1e-6)

"""Fan: prompts that are read once for several compressions, each of which then has rows of its own.

What cuts after the prompt, or later, leaves the prompt's own forward as it is under the full cache. So that forward is
done once, and after each layer's attention every compression takes from it what it observes and makes its own cut: at
most one layer is whole, and what a compression leaves whole it borrows.

Shapes: B rows, H query heads, q new tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kv_lm_eval.cache.attention import Step, attend
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.cache.store import LayerStore
from kv_lm_eval.cache.view import AskedOfCompression


class Fan(Segment):
    """Rows of prompts as the full cache holds them, until they are read.

    Args:
        compression: that of the full cache.
        leaves: for each compression the segment that goes on from the prompts, with as many rows as they are, empty.
    """

    def __init__(self, compression: AskedOfCompression, facts: ModelFacts, leaves: Sequence[Segment]) -> None:
        super().__init__(compression, facts)
        self.leaves = list(leaves)

    def _counts_of(self, rows: Sequence[int]) -> Segment:
        new = super()._counts_of(rows)
        assert isinstance(new, Fan)
        new.leaves = [leaf.select(rows) for leaf in self.leaves]
        return new

    def begin(self, pos: torch.Tensor) -> None:
        """As in `Segment`, of all: places [B, q]."""
        super().begin(pos)
        for leaf in self.leaves:
            leaf.mode = self.mode
            leaf.begin(pos)

    def attend(self, step: Step) -> torch.Tensor:
        """[B, H, q, D]"""
        if step.pos.device != step.query.device:
            step = step._replace(pos=step.pos.to(step.query.device))
        layer, seen = step.layer, self._stored(step)
        out = attend(step, seen)
        for leaf in self.leaves:
            leaf.follow(step, self.stores[layer], seen.old)
        if self.mode == "prefill":
            self.stores[layer] = LayerStore()
        return out

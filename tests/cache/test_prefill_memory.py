"""A prefill holds one whole layer at a time: the ones below are already cut to their budget."""

from __future__ import annotations

import dataclasses

import tiny
import torch

from kv_lm_eval.methods.base import Method, View

BUDGET = 10
lengths: list[list[int]] = []
stores: list = []


class Watching(Method):
    """The most recent tokens; notes what all layers hold at the moment of each cut."""

    def score(self, view: View) -> torch.Tensor:
        lengths.append([0 if s.is_empty else s.length for s in stores])
        return view.pos.float()


def test_lower_layers_are_cut_before_upper_ones_are_read():
    pair = tiny.pair("llama")
    cache = pair.cache(method="window", max_capacity_prompt=BUDGET)
    cache.set(compression=dataclasses.replace(cache.compression, method=Watching()))
    lengths.clear()
    stores[:] = cache.stores
    tiny.forward(pair.model, cache, [tiny.tokens(50)])
    assert lengths == [[50, 0], [BUDGET, 50]]
    for store in cache.stores:
        assert store.keys.untyped_storage().nbytes() < 50 * store.keys.shape[1] * 8 * 4 * 2, "the long buffer is gone"
        assert store.length == BUDGET

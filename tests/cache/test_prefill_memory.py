"""A prefill holds one whole layer at a time: the ones below are already cut to their budget."""

from __future__ import annotations

import dataclasses

import tiny
import torch

from kv_lm_eval.cache.fan import Fan
from kv_lm_eval.engine.together import prefill_for_all
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


def test_several_compressions_of_one_prompt_share_the_layer_that_is_whole(monkeypatch):
    """After each layer nothing of it is whole but what a compression leaves whole, which is there once."""
    pair = tiny.pair("llama")
    settings = [{"method": "window", "max_capacity_prompt": BUDGET}] * 2 + [{"method": "full"}] * 2
    heads, tokens, seen = pair.facts.heads[0][1], 200, []
    original = Fan.attend

    def attend(fan, step):
        out = original(fan, step)
        held = [s for one in (fan, *fan.leaves) for s in one.stores if not s.is_empty]
        buffers = {x.data_ptr(): x.untyped_storage().nbytes() for s in held for x in (s.keys, s.values)}
        seen.append(sum(n >= heads * tokens * step.key.shape[3] * step.key.element_size() for n in buffers.values()))
        return out

    monkeypatch.setattr(Fan, "attend", attend)
    caches, _ = prefill_for_all(
        pair.model, [lambda one=one: pair.cache(**one) for one in settings], [tiny.tokens(tokens)]
    )
    assert seen == [2 * (i + 1) for i in range(pair.facts.num_layers)]  # keys and values of the full caches' layers
    assert [store.length for cache in caches for store in cache.stores][:2] == [BUDGET, BUDGET]

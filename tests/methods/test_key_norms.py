"""Norms decide exactly, against sums in Python's own numbers; only tokens that are one but for rounding tie."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch

from kv_lm_eval.methods.base import View
from kv_lm_eval.methods.knorm import key_norms

CHOICE = {"knorm": {"method": "knorm"}, "l2_fixed": {"method": "l2_fixed", "recent_ratio": 0, "compress_every": 0}}


def view(keys: torch.Tensor, values: torch.Tensor, keep: int) -> View:
    n = keys.shape[2]
    return View(keys, values, torch.arange(n).view(1, 1, n), [n], [keep], 0, 1, None, lambda last: keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CHOICE)
def test_nearly_equal_norms_are_told_apart(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, 2, 400, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    order = torch.randperm(400, generator=generator)
    keys = keys / keys.norm(dim=-1, keepdim=True) * (1 + 1e-6 * order.view(1, 1, -1, 1))  # all within 4e-4
    keys, values = keys.to(dtype), values.to(dtype)
    compression = tiny.compression(**CHOICE[name], max_capacity_prompt=150)
    seen = view(keys, values, 150)
    kept = compression.evicted.cut(compression.method, seen, compression.score(seen), torch.tensor([[150, 150]]))
    for head in range(2):
        squares = [math.fsum(x * x for x in key) for key in keys[0, head].double().tolist()]
        best = sorted(range(400), key=lambda t: (squares[t], t))[:150]
        assert sorted(kept.pos[0, head].tolist()) == sorted(best)


@pytest.mark.parametrize("model", ["llama", "qwen3", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("name", CHOICE)
def test_every_layer_keeps_what_exact_norms_choose(model: str, name: str) -> None:
    """But for repeated tokens of the first layer, of which the older stays: the keys are one but for rounding."""
    pair, row, keep = tiny.pair(model), [*tiny.tokens(60, seed=1)[:30] * 2, *tiny.tokens(90, seed=2)], 60
    full, cut = pair.cache(method="full"), pair.cache(**CHOICE[name], max_capacity_prompt=keep)
    for cache in (full, cut):
        tiny.forward(pair.model, cache, [row])
    for layer in pair.facts.cut_layers:
        for head, keys in enumerate(full.stores[layer].keys[0].double().tolist()):
            norms = [math.sqrt(math.fsum(x * x for x in key)) for key in keys]
            exact = set(sorted(range(len(row)), key=lambda t: (norms[t], t))[:keep])
            got = set(tiny.kept(cut, layer)[head])
            for mine, other in zip(sorted(got - exact), sorted(exact - got), strict=True):
                assert layer == 0 and row[mine] == row[other] and mine < other
                assert norms[mine] == pytest.approx(norms[other], rel=1e-6)


def first_layer(pair: tiny.Pair, rows: list[list[int]], **args: Any) -> list[list[int]]:
    """Positions that each head of the first layer keeps of the last row."""
    cache = pair.cache(method="knorm", max_capacity_prompt=25, **args)
    tiny.forward(pair.model, cache, rows)
    return tiny.kept(cache, 0, len(rows) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", ["llama", "gpt_neox", "qwen3"])
def test_repeated_tokens_tie_in_the_first_layer_whatever_the_batch(model: str, dtype: torch.dtype) -> None:
    net = tiny.build(model).to(dtype)
    pair = tiny.Pair(net, net, tiny.wrap(net, tiny.compression(method="full")))
    row = tiny.tokens(10, seed=5) * 6
    alone = first_layer(pair, [row])
    assert alone == first_layer(pair, [tiny.tokens(97, seed=1), tiny.tokens(3), row])
    for head in alone:  # whole tokens: all six of the best, the older ones of the last
        counts = {token: [p for p in head if row[p] == token] for token in set(row)}
        for places in counts.values():
            assert places == [p for p in range(60) if row[p] == row[places[0]]][: len(places)] if places else True
        assert sorted(len(p) for p in counts.values())[-4:] == [6, 6, 6, 6]


def test_different_values_do_not_tie_and_empty_slots_do_no_harm() -> None:
    keys = torch.ones(1, 1, 6, 4)
    keys[0, 0, 2] *= 1 + 2e-7
    values = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 5.0]).view(1, 1, 6, 1).expand(1, 1, 6, 4).clone()
    seen = view(keys, values, 3)
    seen.pos = torch.tensor([[[-1, 1, 2, 3, 4, 5]]])
    keys[0, 0, 0] = float("nan")
    norms = key_norms(seen)[0, 0]
    assert norms[2] == norms[4] and norms[1:].isfinite().all()  # one value, keys of one norm but for rounding
    values[0, 0, 2] = 7.0
    norms = key_norms(view(keys[:, :, 1:], values[:, :, 1:], 3))[0, 0]
    assert norms[1] > norms[3]  # another value: another token

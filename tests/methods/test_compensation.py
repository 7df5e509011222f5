"""Compensation tokens, against plain loops over the definition, and the identities that follow from it."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from methods.test_kept_sets import Stock

from kv_lm_eval.errors import UserError

WINDOW, KERNEL, CAPACITY, LENGTH = 5, 3, 18, 60
SNAPKV = {"method": "snapkv_comp", "window_size": WINDOW, "kernel_size": KERNEL, "max_capacity_prompt": CAPACITY}


def expected_pairs(
    name: str, row: list[int], size: int, weight: str = "attn", empty_block: str = "zero"
) -> list[list[tuple[list[float], list[float]]]]:
    """Per KV head of the first layer: pairs (key, value) as the definition makes them, unordered."""
    stock, pair = Stock(name), tiny.pair(name)
    weights = stock.attentions(row)[0]
    full = pair.cache(method="full")
    tiny.forward(pair.model, full, [row])
    store, out = full.stores[0], []
    for head in range(stock.kv_heads):
        keys, values = store.keys[0, head].double().tolist(), store.values[0, head].double().tolist()
        old = range(len(row) - WINDOW)
        group = range(head * stock.group, (head + 1) * stock.group)
        votes = [
            sum(weights[h][q][t] for h in group for q in range(len(row) - WINDOW, len(row))) / stock.group for t in old
        ]
        pooled = {t: max(votes[u] for u in range(t - 1, t + 2) if u in old) for t in old}
        if weight == "uniform":
            votes = [1.0] * len(old)
        blocks = [list(old)[i : i + size] for i in range(0, len(old), size)]
        room, ranked = CAPACITY - WINDOW, sorted(old, key=lambda t: (-pooled[t], t))
        if room > len(blocks) and empty_block == "drop":
            chosen = next(
                set(ranked[:m])
                for m in range(room, -1, -1)
                if m + sum(not set(block) <= set(ranked[:m]) for block in blocks) <= room
            )
            blocks = [block for block in blocks if not set(block) <= chosen]
        elif room > len(blocks):
            chosen = set(ranked[: room - len(blocks)])
        else:
            chosen = set()
            heavy = sorted(range(len(blocks)), key=lambda j: (-sum(votes[t] for t in blocks[j]), j))[:room]
            blocks = [blocks[j] for j in sorted(heavy)]
        pairs = [(keys[t], values[t]) for t in [*sorted(chosen), *range(len(row) - WINDOW, len(row))]]
        for block in blocks:
            rest = [t for t in block if t not in chosen]
            total = sum(votes[t] for t in rest)
            zero = [0.0] * len(keys[0])
            pairs.append(
                tuple(
                    [sum(votes[t] * x[t][d] for t in rest) / total for d in range(len(zero))] if total else zero
                    for x in (keys, values)
                )
            )
        out.append(pairs)
    return out


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("weight", ["attn", "uniform"])
@pytest.mark.parametrize("empty_block", ["zero", "drop"])
@pytest.mark.parametrize("length", [LENGTH, 22], ids=["", "short: blocks are wholly kept"])
@pytest.mark.parametrize("block_size", ["full", 100, 55, 20, 7, 5, 4, 3, 2, 1])
def test_kept_and_averaged_pairs_are_those_of_the_definition(name, block_size, length, empty_block, weight):
    pair, row = tiny.pair(name), tiny.tokens(length, seed=11)
    cache = pair.cache(**SNAPKV, block_size=block_size, empty_block=empty_block, weight=weight)
    tiny.forward(pair.model, cache, [row])
    store = cache.stores[0]
    size = LENGTH if block_size == "full" else block_size
    for head, pairs in enumerate(expected_pairs(name, row, size, weight, empty_block)):
        assert len(pairs) == CAPACITY == store.length
        expected = torch.tensor([k + v for k, v in pairs])
        got = torch.cat([store.keys[0, head], store.values[0, head]], dim=-1)
        distance = torch.cdist(expected.float(), got)
        assert distance.min(1).values.max() <= 1e-5 and distance.min(0).values.max() <= 1e-5


def test_one_block_as_long_as_the_old_tokens_is_the_full_block():
    pair, row = tiny.pair("llama"), tiny.tokens(LENGTH, seed=12)
    caches = [pair.cache(**SNAPKV, block_size=size) for size in ("fullc", LENGTH - WINDOW, 4096)]
    logits = [tiny.forward(pair.model, c, [row]) for c in caches]
    after = [tiny.forward(pair.model, c, [[7]], starts=[LENGTH]) for c in caches]
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2]) and torch.equal(logits[0], logits[1])


def test_a_block_that_is_wholly_kept_is_a_pair_of_zeros_or_gives_its_slot_away():
    pair, row = tiny.pair("llama"), tiny.tokens(22, seed=13)
    zero, drop = (
        pair.cache(**{**SNAPKV, "max_capacity_prompt": 20}, block_size=3, empty_block=e) for e in ("zero", "drop")
    )
    for cache in (zero, drop):
        tiny.forward(pair.model, cache, [row])
        assert cache.stores[0].length == 20
    empty = [(c.stores[0].keys == 0).all(-1).sum().item() for c in (zero, drop)]
    assert empty[0] > 0 and empty[1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_averages_are_finite_in_half_precision(dtype):
    pair = tiny.pair("llama")
    cache = pair.cache(**SNAPKV, block_size="full")
    tiny.forward(pair.model, cache, [tiny.tokens(LENGTH)])
    compression = cache.compression
    from kv_lm_eval.methods.base import View

    keys = torch.randn(1, 2, 40, 8).to(dtype)
    tiny_weights = torch.full((1, 2, 1, WINDOW, 40), 1e-30)
    view = View(
        keys, keys, torch.arange(40).view(1, 1, 40), [40], [CAPACITY], 0, 2, None, lambda w: tiny_weights[..., :w, :]
    )
    kept = compression.evicted.cut(compression.method, view, compression.method.score(view), torch.tensor([[CAPACITY]]))
    assert kept.keys.isfinite().all() and kept.values.isfinite().all() and kept.keys.dtype == dtype


def test_any_scorer_can_be_compensated_and_masses_add_up():
    pair = tiny.pair("llama")
    budget = {"max_capacity_prompt": 16, "evicted": "compensate", "block_size": 8}
    for settings in ({"method": "knorm", "weight": "uniform"}, {"method": "h2o", "compress_every": 2}):
        cache = pair.cache(**settings, **budget)
        tiny.forward(pair.model, cache, [tiny.tokens(40)])
        if settings["method"] == "h2o":
            mass = cache.stores[0].mass
            assert math.isclose(mass.sum().item(), 40 * 2, rel_tol=1e-4), "every query gives one unit to each KV head"
        for step in range(4):
            assert tiny.forward(pair.model, cache, [[5 + step]], starts=[40 + step]).isfinite().all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"method": "knorm", "evicted": "compensate"}, "knorm does not look at; use weight=uniform"),
        ({"method": "snapkv", "block_size": 32}, "block_size=32 has no effect"),
        ({"method": "snapkv_comp", "block_size": 0}, "at least 1, or full"),
        ({"method": "snapkv_comp", "block_size": "half"}, "at least 1, or full"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        tiny.compression(**args, max_capacity_prompt=64)

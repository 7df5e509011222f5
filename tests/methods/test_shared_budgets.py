"""How layers and heads share a budget, and the methods that are only a score: against plain loops."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.test_kept_sets import Stock, best, held_by, ours, snapkv

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View
from kv_lm_eval.methods.budget import Heads, Layers

MODELS = ("llama", "gpt_neox")
WINDOW = {"window_size": 5, "kernel_size": 3}


# --- layers ---------------------------------------------------------------------------------------------------------


REFERENCE = {"rounding": "reference"}


def kvcache_factory_pyramid(capacity: int, window: int, length: int, layers: int, beta: int) -> list[int]:
    """KVCache-Factory's arithmetic, per layer, window included."""
    c = capacity - window
    low = c // beta
    high = 2 * c - low
    if high >= length - window:
        high = length - window
        low = 2 * c - high
    step = (high - low) // (layers - 1)
    if length < capacity:
        return [length] * layers
    if length < 2 * c:
        return [capacity] * layers
    return [high - layer * step + window for layer in range(layers)]


@given(st.integers(2, 40), st.integers(1, 16), st.integers(2, 400), st.integers(1, 600), st.integers(1, 30))
@settings(derandomize=True, deadline=None, database=None)
def test_pyramid_budgets_of_the_reference_are_those_of_kvcache_factory(layers, window, over, length, beta):
    capacity = window + over
    shares = Layers("pyramid", beta, "reference")
    got = [min(length, shares.share(capacity, length, layer, layers, window)) for layer in range(layers)]
    assert got == kvcache_factory_pyramid(capacity, window, length, layers, beta)


@given(st.integers(2, 40), st.integers(0, 16), st.integers(1, 400), st.integers(1, 30))
@settings(derandomize=True, deadline=None, database=None)
def test_exact_pyramid_budgets_have_the_mean_at_every_length_and_grow_by_one_a_token(layers, window, over, beta):
    mean, shares = window + over, Layers("pyramid", beta)
    before = None
    for length in range(mean, 2 * mean + 20):
        now = [shares.share(mean, length, layer, layers, window) for layer in range(layers)]
        assert sum(now) == layers * mean
        assert now == sorted(now, reverse=True) and length >= now[0] and now[-1] >= max(window, 1)
        assert before is None or all(b <= a + 1 for a, b in zip(before, now, strict=True)), "a layer can follow"
        before = now
    steep = kvcache_factory_pyramid(mean, window, 10**6, layers, beta)
    assert (now[0], now[-1]) == (steep[0], max(2 * mean - steep[0], 1)) or window == 0


@given(st.lists(st.integers(0, 60), min_size=2, max_size=8), st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.7, 1.0]), st.data())
@settings(derandomize=True, deadline=None, database=None)
def test_head_budgets_of_the_reference_are_those_of_adakv(scored, alpha, data):
    """FFY0/AdaKV: torch.round(capacity * (1 - floor_ratio) + int(base_capacity * floor_ratio)), beside the window."""
    heads, window = len(scored), data.draw(st.integers(0, 5))
    scored[0] += -sum(scored) % heads
    base = sum(scored) // heads
    if base == 0:
        return
    n = 80 + window
    scores = torch.zeros(1, heads, n)
    scores[..., n - window :] = float("inf")
    for head, best_of_all in enumerate(scored):
        scores[0, head, :best_of_all] = 1
    got = Heads("ada", alpha, "reference").split(scores, torch.arange(n).view(1, 1, n), [base + window], window)
    expected = torch.round(torch.tensor(scored) * (1 - alpha) + int(base * alpha)).int() + window
    assert got[0].tolist() == expected.tolist()


@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_pyramidkv_keeps_snapkvs_choice_under_each_layers_budget(name, rounding):
    row = tiny.tokens(80, seed=1)
    capacities = kvcache_factory_pyramid(20, 5, 80, 2, 20)  # two layers: nothing to round
    assert capacities[0] > 20 > capacities[1]
    expected = [snapkv(Stock(name), row, 5, 3, "max", capacity)[i] for i, capacity in enumerate(capacities)]
    got = ours(name, row, method="pyramidkv", max_capacity_prompt=20, rounding=rounding, **WINDOW)
    assert got[0] == expected[0]
    assert [len(head) for head in got[1]] == [capacities[1]] * len(got[1])


@pytest.mark.parametrize("name", MODELS)
def test_skipped_layers_stay_whole_and_the_others_are_cut(name):
    pair = tiny.pair(name)
    cache = pair.cache(method="knorm", max_capacity_prompt=10, skip_layers="[0]")
    tiny.forward(pair.model, cache, [tiny.tokens(40)])
    assert [len(head) for head in tiny.kept(cache, 0)] == [40]
    assert {len(head) for head in tiny.kept(cache, 1)} == {10}
    after = tiny.forward(pair.model, cache, [[3]], starts=[40])
    assert after.isfinite().all()


# --- heads ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(-5, 5), min_size=12, max_size=12), min_size=2, max_size=4),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.integers(0, 11),
)
@settings(derandomize=True, deadline=None, database=None)
def test_heads_with_a_floor_keep_their_best_and_the_best_of_all(scores, keep, alpha, empty):
    """Two rows, the second with empty slots at its beginning, against plain loops over each."""
    heads = len(scores)
    pos = torch.stack([torch.arange(12), torch.arange(12) - empty]).clamp_min(-1)[:, None]
    got = Heads("ada_floor", alpha).split(torch.tensor([scores] * 2).float(), pos, [keep, min(keep, 12 - empty)])
    for row, first in ((0, 0), (1, empty)):
        slots = min(keep, 12 - first)
        floor = max(int(slots * alpha), 1) if alpha else 0
        ranked = []
        for head in range(heads):
            order = sorted(range(first, 12), key=lambda t: -scores[head][t])
            ranked += [(place >= floor, -scores[head][t], head, t) for place, t in enumerate(order)]
        stays = sorted(ranked)[: heads * slots]
        assert got[row].tolist() == [sum(h == head for _, _, h, _ in stays) for head in range(heads)]
        assert got[row].sum() == heads * slots and got[row].min() >= floor


@given(
    st.lists(st.lists(st.integers(-5, 5), min_size=12, max_size=12), min_size=2, max_size=4),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
@settings(derandomize=True, deadline=None, database=None)
def test_heads_share_a_layers_slots_exactly(scores, keep, alpha):
    heads = len(scores)
    pos = torch.arange(12).expand(1, 1, 12)
    got = Heads("ada", alpha).split(torch.tensor([scores]).float(), pos, [keep])[0].tolist()
    ranked = sorted((-scores[h][t], h, t) for h in range(heads) for t in range(12))[: heads * keep]
    wanted = [sum(h == head for _, h, _ in ranked) for head in range(heads)]
    assert sum(got) == heads * keep
    for g, w in zip(got, wanted, strict=True):
        assert abs(g - ((1 - alpha) * w + alpha * keep)) < 1 + 1e-9
        assert math.floor(alpha * keep + 1e-9) <= g <= 12


@pytest.mark.parametrize("name", MODELS)
def test_adakv_without_safeguard_keeps_the_best_of_all_heads_together(name):
    row, stock = tiny.tokens(60, seed=2), Stock(name)
    got = ours(name, row, method="adakv", max_capacity_prompt=15, alpha=0, **WINDOW)
    for layer, weights in enumerate(stock.attentions(row)):
        if layer:  # deeper layers see the same keys here, since the cut follows each layer's attention
            continue
        pooled = {}
        for kv in range(stock.kv_heads):
            group = range(kv * stock.group, (kv + 1) * stock.group)
            votes = [sum(weights[h][q][t] for h in group for q in range(55, 60)) for t in range(55)]
            for t in range(55):
                pooled[kv, t] = max(votes[u] for u in (t - 1, t, t + 1) if 0 <= u < 55)
        chosen = sorted(pooled, key=lambda k: (-pooled[k], k))[: 10 * stock.kv_heads]
        expected = [{t for kv, t in chosen if kv == head} | set(range(55, 60)) for head in range(stock.kv_heads)]
        assert [len(e) for e in expected] == [len(g) for g in got[0]]
        assert got[0] == expected


def test_adakv_with_the_whole_share_guaranteed_is_snapkv():
    row = tiny.tokens(60, seed=3)
    budget = {"max_capacity_prompt": 15, **WINDOW}
    assert ours("llama", row, method="adakv", alpha=1, **budget) == ours("llama", row, method="snapkv", **budget)


def test_ragged_heads_are_really_held_and_counted():
    pair = tiny.pair("llama")
    cache = pair.cache(method="adakv", max_capacity_prompt=15, alpha=0, **WINDOW)
    tiny.forward(pair.model, cache, [tiny.tokens(60, seed=2)])
    lengths = [len(head) for head in tiny.kept(cache, 0)]
    assert sum(lengths) == 15 * len(lengths) and max(lengths) > min(lengths)
    sizes = cache.snapshot()
    per_slot = 2 * 8 * 4  # key and value of head size 8 in float32
    assert sizes["kv_bytes_valid"] == [2 * sum(lengths) * per_slot]
    assert sizes["kv_bytes_allocated"] >= max(lengths) * len(lengths) * per_slot


# --- scores ---------------------------------------------------------------------------------------------------------


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


@pytest.mark.parametrize("name", MODELS)
def test_keydiff_keeps_the_keys_that_differ_most_from_the_mean_direction(name):
    row, stock = tiny.tokens(50, seed=4), Stock(name)
    expected = []
    for keys in stock.keys(row):
        expected.append([])
        for head in keys:
            units = [[x / math.sqrt(sum(y * y for y in k)) for x in k] for k in head]
            mean = [sum(u[d] for u in units) / len(units) for d in range(len(units[0]))]
            expected[-1].append(best({t: -cosine(k, mean) for t, k in enumerate(head)}, 12))
    assert ours(name, row, method="keydiff", max_capacity_prompt=12) == expected


def test_keydiff_keeps_the_older_of_keys_equally_far_from_their_mean_whatever_the_rounding():
    method = tiny.compression(method="keydiff", max_capacity_prompt=3)
    noise = torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys = torch.eye(8, dtype=torch.float64).expand(1, 2, 8, 8) + 1e-12 * noise
    view = View(keys, keys, torch.arange(8).view(1, 1, 8), [8], [3], 0, 1, None, lambda last: keys)
    kept = method.evicted.cut(method.method, view, method.score(view), torch.tensor([[3, 3]]))
    assert kept.pos.tolist() == [[[0, 1, 2]] * 2]


@pytest.mark.parametrize("name", MODELS)
def test_lagkv_ranks_tokens_within_partitions_scaled_by_the_next_one(name):
    row, lag, sinks, budget = tiny.tokens(47, seed=5), 10, 3, 20
    pair = tiny.pair(name)
    full = pair.cache(method="full")
    tiny.forward(pair.model, full, [row])
    store = full.stores[0]
    expected = []
    for head in range(store.keys.shape[1]):
        place = {t: float("inf") for t in range(sinks)}
        for part in range(3):  # 44 tokens after the sinks: four partitions, the last of which is not ranked
            own = range(sinks + lag * part, sinks + lag * (part + 1))
            strength = dict.fromkeys(own, 0.0)
            for x in (store.keys[0, head].double().tolist(), store.values[0, head].double().tolist()):
                following = [x[t + lag] for t in own]
                low, high = ([f(c) for c in zip(*following, strict=True)] for f in (min, max))
                spread = {}
                for t in own:
                    scaled = [(v - a) / (b - a) for v, a, b in zip(x[t], low, high, strict=True)]
                    mean = sum(scaled) / len(scaled)
                    spread[t] = math.sqrt(sum((s - mean) ** 2 for s in scaled) / (len(scaled) - 1))
                total = sum(math.exp(s) for s in spread.values())
                strength = {t: strength[t] + math.exp(spread[t]) / total for t in own}
            for rank, t in enumerate(sorted(own, key=lambda t: -strength[t])):
                place[t] = -1 - rank
        place.update({t: t for t in range(sinks + 3 * lag, 47)})
        expected.append(best(place, budget))
    assert ours(name, row, method="lagkv", n_sink=sinks, lag_size=lag, max_capacity_prompt=budget)[0] == expected


@pytest.mark.parametrize("strategy", ["keep_low", "keep_high", "recent_only", "random"])
def test_l2_fixed_holds_its_size_at_every_step_and_protects_the_newest(strategy):
    pair, row = tiny.pair("llama"), tiny.tokens(46, seed=6)
    cache = pair.cache(method="l2_fixed", cache_size=16, strategy=strategy, recent_ratio=0.25)
    held = None
    keys = Stock("llama").keys(row)[0]  # of the first layer: they do not depend on what was evicted
    for step in range(7):
        fed = row[:40] if step == 0 else row[39 + step : 40 + step]
        tiny.forward(pair.model, cache, [fed], starts=[0 if step == 0 else 39 + step])
        seen = 40 + step
        before = [set(range(40))] * 2 if held is None else [h | {seen - 1} for h in held]
        held = held_by(cache)[0]
        held = held * 2 if len(held) == 1 else held
        recent = set(range(seen - 4, seen))
        for head in range(2):
            assert len(held[head]) == 16 and recent <= held[head] <= before[head]
            old = before[head] - recent
            norm = {t: math.sqrt(sum(x * x for x in keys[head][t])) for t in old}
            if strategy == "keep_low":
                assert held[head] - recent == best({t: -n for t, n in norm.items()}, 12)
            if strategy == "keep_high":
                assert held[head] - recent == best(norm, 12)
            if strategy == "recent_only":
                assert held[head] == set(range(seen - 16, seen))


def test_knorm_at_every_step_is_a_bounded_cache_that_saws():
    pair = tiny.pair("llama")
    cache = pair.cache(method="knorm", keep_ratio=0.5, prune_after=20, compress_every=1)
    lengths = []
    for t, token in enumerate(tiny.tokens(70, seed=7)):
        tiny.forward(pair.model, cache, [[token]], starts=[t])
        lengths.append(cache.held[0][0])
    assert max(lengths) == 20 and min(lengths[21:]) == 10  # floor(0.5 * 21)


def test_knorm_can_protect_the_newest_tokens():
    got = ours("llama", tiny.tokens(50, seed=8), method="knorm", max_capacity_prompt=12, recent_protected=5)
    assert all(set(range(45, 50)) <= head and len(head) == 12 for layer in got for head in layer)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"method": "snapkv", "max_capacity_prompt": 64, "alpha": 0.3},
            "alpha=0.3 has no effect without head_budget=ada",
        ),
        ({"method": "snapkv", "max_capacity_prompt": 64, "beta": 3}, "beta=3 has no effect without layer_budget"),
        ({"method": "knorm", "max_capacity_prompt": 64, "prune_after": 3}, "prune_after=3 has no effect without keep"),
        ({"method": "pyramidkv", "keep_ratio": 0.5, "prune_after": 9}, "which then differs between layers"),
        ({"method": "tova", "max_capacity_prompt": 64, "head_budget": "ada"}, "the same scores"),
        ({"method": "window", "max_capacity_prompt": 64, "head_budget": "ada"}, "the same scores"),
        ({"method": "l2_fixed", "strategy": "recent_only", "head_budget": "ada"}, "the same scores"),
        ({"method": "l2_fixed", "seed": 3}, "seed=3 has no effect with strategy=keep_low"),
        ({"method": "knorm", "max_capacity_prompt": 64, "rounding": "reference"}, "rounding=reference has no effect"),
        ({"method": "knorm", "max_capacity_prompt": 1e90}, "1e.90 is beyond the numbers"),
        ({"method": "knorm", "max_capacity_prompt": 9, "skip_layers": [2**40]}, "beyond the numbers"),
        ({"method": "expected_attention", "max_capacity_prompt": 9, "epsilon": "nan"}, "must be a finite number"),
        ({"method": "expected_attention", "max_capacity_prompt": 9, "n_future_positions": 1e9}, "at most 131072"),
        ({"method": "snapkv", "max_capacity_prompt": 64, "layer_budget": "cone"}, "not one of: uniform, pyramid"),
        ({"method": "snapkv", "max_capacity_prompt": 64, "head_budget": "adaa"}, "did you mean 'ada'"),
        ({"method": "l2_fixed", "cache_size": 1}, "must be at least 2"),
        ({"method": "knorm", "max_capacity_prompt": 9, "skip_layers": "[0,x]"}, "must be whole numbers"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        tiny.compression(**args)

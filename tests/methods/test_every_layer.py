"""Methods whose first layer alone is not enough: every layer and head of padded batches, against plain loops."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import tiny
import torch
import transformers as tf
from methods.test_kept_sets import Stock, best, held_by, snapkv

from kv_lm_eval.cache.attention import Step
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.methods.base import View

MODELS = ("llama", "qwen3", "gpt_neox")
LENGTHS = (60, 41, 24)
WINDOW, KERNEL, CAPACITY = 5, 3, 16
VOTES = {"window_size": WINDOW, "kernel_size": KERNEL}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def padded(name: str, **settings: object) -> tuple[CompressedCache, list[list[int]]]:
    pair, rows = tiny.pair(name), [tiny.tokens(n, seed=n) for n in LENGTHS]
    cache = pair.cache(**settings)
    tiny.forward(pair.model, cache, rows)
    return cache, rows


# --- PyramidKV ------------------------------------------------------------------------------------------------------


def test_pyramidkv_in_every_layer(name: str) -> None:
    cache, rows = padded(name, method="pyramidkv", max_capacity_prompt=CAPACITY, **VOTES)
    for i, row in enumerate(rows):
        bottom = 2 * (CAPACITY - WINDOW) - (CAPACITY - WINDOW) // 20
        bottom = min(bottom, len(row) - WINDOW)  # a bottom that would be longer than the prompt leaves more to the top
        capacities = [bottom + WINDOW, 2 * (CAPACITY - WINDOW) - bottom + WINDOW]
        for layer, capacity in enumerate(capacities):
            assert held_by(cache, i)[layer] == snapkv(Stock(name), row, WINDOW, KERNEL, "max", capacity)[layer]


# --- Ada-KV ---------------------------------------------------------------------------------------------------------


def shared(wanted: list[int], capacity: int, alpha: str, available: int) -> list[int]:
    """Slots of each head: alpha of an equal part and the rest as wanted, in whole numbers with the sum kept."""
    exact = [(1 - Fraction(alpha)) * w + Fraction(alpha) * capacity for w in wanted]
    slots = [min(math.floor(x), available) for x in exact]
    while sum(slots) < capacity * len(wanted):
        open_heads = [h for h in range(len(slots)) if slots[h] < available]
        slots[max(open_heads, key=lambda h: (exact[h] - slots[h], -h))] += 1
    return slots


@pytest.mark.parametrize("alpha", ["0", "0.2", "0.5", "0.9", "1"])
def test_adakv_in_every_layer_and_for_every_safeguard(name: str, alpha: str) -> None:
    cache, rows = padded(name, method="adakv", max_capacity_prompt=CAPACITY, alpha=float(alpha), **VOTES)
    for i, row in enumerate(rows):
        n, stock, expected = len(row), Stock(name), []
        for weights in stock.attentions(row):
            pooled: dict[int, dict[int, float]] = {}
            for head in range(stock.kv_heads):
                group = range(head * stock.group, (head + 1) * stock.group)
                votes = [sum(weights[h][q][t] for h in group for q in range(n - WINDOW, n)) for t in range(n - WINDOW)]
                pooled[head] = {t: max(votes[max(t - 1, 0) : t + 2]) for t in range(n - WINDOW)}
            ranked = sorted(((-s, h, t) for h, scores in pooled.items() for t, s in scores.items()))
            chosen = [h for _, h, _ in ranked[: (CAPACITY - WINDOW) * stock.kv_heads]]
            wanted = [WINDOW + chosen.count(h) for h in range(stock.kv_heads)]
            slots = shared(wanted, CAPACITY, alpha, n)
            window = set(range(n - WINDOW, n))
            expected.append([best(pooled[h], slots[h] - WINDOW) | window for h in range(stock.kv_heads)])
        assert held_by(cache, i) == expected, f"row of {n} tokens"


# --- LagKV ----------------------------------------------------------------------------------------------------------


def test_lagkv_in_every_layer(name: str) -> None:
    sinks, lag, budget = 2, 8, 15
    cache, rows = padded(name, method="lagkv", n_sink=sinks, lag_size=lag, max_capacity_prompt=budget)
    stock = tiny.build(name)
    for i, row in enumerate(rows):
        full = tf.DynamicCache(config=stock.config)
        with torch.inference_mode():
            stock(input_ids=torch.tensor([row]), **tiny.given(full), use_cache=True)
        expected = []
        for layer in full.layers:
            expected.append([])
            for keys, values in zip(layer.keys[0].double().tolist(), layer.values[0].double().tolist(), strict=True):
                expected[-1].append(lagkv(keys, values, sinks, lag, budget))
        assert held_by(cache, i) == expected, f"row of {len(row)} tokens"


def lagkv(keys: list[list[float]], values: list[list[float]], sinks: int, lag: int, budget: int) -> set[int]:
    """Tokens of a head that stay, by plain loops."""
    score = {t: float("inf") if t < sinks else float(t) for t in range(len(keys))}
    for part in range((len(keys) - sinks) // lag - 1):
        own = range(sinks + part * lag, sinks + (part + 1) * lag)
        total = dict.fromkeys(own, 0.0)
        for x in (keys, values):
            spread = {t: spread_of(x[t], [x[u + lag] for u in own]) for t in own}
            norm = sum(math.exp(s) for s in spread.values())
            total = {t: total[t] + math.exp(spread[t]) / norm for t in own}
        for rank, t in enumerate(sorted(own, key=lambda t: (-total[t], t))):
            score[t] = -1 - rank
    return best(score, budget)


def spread_of(token: list[float], following: list[list[float]]) -> float:
    """Standard deviation over the channels of a token scaled by minimum and maximum of the following partition."""
    low, high = ([pick(channel) for channel in zip(*following, strict=True)] for pick in (min, max))
    scaled = [(x - a) / max(b - a, 1e-9) for x, a, b in zip(token, low, high, strict=True)]
    mean = sum(scaled) / len(scaled)
    return math.sqrt(sum((s - mean) ** 2 for s in scaled) / (len(scaled) - 1))


# --- H2O ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_h2o_sums_attention_in_float32_whatever_the_models_precision(dtype: torch.dtype) -> None:
    length, capacity = 700, 40
    keys = torch.zeros(1, 2, length, 8, dtype=dtype)
    query = torch.zeros(1, 4, length, 8, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    keys[:], query[:] = torch.randn(keys.shape, generator=generator), torch.randn(query.shape, generator=generator)
    keys[:, :, 0] *= 3  # a heavy token: its sum is beyond what half precision counts in ones
    cache = tiny.pair("llama").cache(method="h2o", max_capacity_prompt=capacity)
    cache.attend(Step(0, query, keys, keys, torch.arange(length)[None], 8**-0.5), None)
    logits = query.double() @ keys.double().repeat_interleave(2, dim=1).transpose(2, 3) * 8**-0.5
    weights = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
    mass = weights.sum(2).view(1, 2, 2, length).mean(2)[0]
    store = cache.stores[0]
    assert store.mass is not None and store.mass.dtype == torch.float32
    for head in range(2):
        held = store.pos[0, head].tolist()
        recent = set(range(length - capacity // 2, length))
        old = {t: float(mass[head, t]) for t in range(length) if t not in recent}
        wanted = sorted(old.values(), reverse=True)[capacity // 2 - 1]
        assert recent <= set(held) and len(held) == capacity
        # logits are rounded by the model's precision: a token may be taken for another of nearly the same sum
        assert min(old[t] for t in held if t in old) >= wanted * (1 - 2 * torch.finfo(dtype).eps)
        got = store.mass[0, head].double()
        assert (got / mass[head, held] - 1).abs().max() < 4 * torch.finfo(dtype).eps


def test_h2o_breaks_ties_for_the_older_token() -> None:
    method = tiny.compression(method="h2o", max_capacity_prompt=8, window_size=2)
    x = torch.zeros(1, 1, 20, 4)
    for mass in (torch.ones(1, 1, 20), torch.tensor([1.0, 2.0] * 10).view(1, 1, 20)):
        view = View(x, x, torch.arange(20).view(1, 1, 20), [20], [8], 0, 1, mass, lambda last: x)
        kept = method.evicted.cut(method.method, view, method.method.score(view), torch.tensor([[8]]))
        best_of_old = [0, 1, 2, 3, 4, 5] if mass.max() == 1 else [1, 3, 5, 7, 9, 11]
        assert kept.pos[0, 0].tolist() == [*best_of_old, 18, 19]

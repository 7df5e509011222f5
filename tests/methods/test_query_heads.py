"""gqa=query_head: the original's cache, in which every query head chooses for itself from keys repeated for it."""

from __future__ import annotations

import pytest
import tiny
import torch
from cache.test_evict_equals_mask import eager_twin, masked_logits
from methods.test_kept_sets import Stock, best, held_by

WINDOW, KERNEL, CAPACITY = 6, 3, 18
SNAPKV = {"method": "snapkv", "window_size": WINDOW, "kernel_size": KERNEL, "max_capacity_prompt": CAPACITY}


def original(name: str, row: list[int], pooling: str) -> list[list[set[int]]]:
    """Kept positions [layer][query head]: votes of the window summed, pooled, the best of them; nothing is averaged."""
    stock, n, out = Stock(name), len(row), []
    for weights in stock.attentions(row):
        out.append([])
        for head in range(stock.heads):
            if n <= CAPACITY:
                out[-1].append(set(range(n)))
                continue
            old = range(n - WINDOW)
            votes = [sum(weights[head][q][t] for q in range(n - WINDOW, n)) for t in old]
            pooled = {}
            for t in old:
                near = [votes[u] for u in range(t - KERNEL // 2, t + KERNEL // 2 + 1) if u in old]
                pooled[t] = max(near) if pooling == "max" else sum(near) / KERNEL
            out[-1].append(best(pooled, CAPACITY - WINDOW) | set(range(n - WINDOW, n)))
    return out


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_every_query_head_keeps_what_the_original_keeps_in_a_padded_batch(name: str, pooling: str) -> None:
    pair, rows = tiny.pair(name), [tiny.tokens(n, seed=n) for n in (60, 41, 18)]
    cache = pair.cache(**SNAPKV, pooling=pooling, gqa="query_head")
    full = pair.cache(method="full")
    for c in (cache, full):
        tiny.forward(pair.model, c, rows)
    for i, row in enumerate(rows):
        assert held_by(cache, i) == original(name, row, pooling), f"row of {len(row)} tokens"
    for store, whole in zip(cache.stores, full.stores, strict=True):
        assert store.keys.shape[1] == 4
        for i, row in enumerate(rows):
            for head in range(4):
                slots = store.pos[i, head] >= 0
                columns = store.pos[i, head, slots].long() + max(map(len, rows)) - len(row)  # empty slots come first
                kv_head = head * whole.keys.shape[1] // 4
                assert torch.equal(store.keys[i, head, slots], whole.keys[i, kv_head, columns])
                assert torch.equal(store.values[i, head, slots], whole.values[i, kv_head, columns])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gemma2"])
@pytest.mark.parametrize("every", [0, 3])
def test_later_tokens_see_what_each_query_head_kept(name: str, every: int) -> None:
    pair, stock, n = tiny.pair(name), eager_twin(name), 40
    row = tiny.tokens(n + 3, seed=3)
    cache = pair.cache(**SNAPKV, gqa="query_head", compress_every=every)
    tiny.forward(pair.model, cache, [row[:n], row[:25]])
    kept = [tiny.kept(cache, layer) for layer in range(2)]
    got = [
        tiny.forward(pair.model, cache, [row[a:b], row[25 : 25 + b - a]], starts=[a, 25 + a - n])[0]
        for a, b in ((n, n + 1), (n + 1, n + 3))
    ]
    wanted = masked_logits(stock, row, n, kept)[n:]
    assert (torch.cat(got) - wanted).abs().max() <= 1e-4
    assert all(len(held) == 4 for layer, held in enumerate(kept) if pair.facts.compressible(layer))


def test_scoring_without_storing_sees_the_same() -> None:
    pair, row = tiny.pair("llama"), tiny.tokens(44, seed=3)
    cache = pair.cache(**SNAPKV, gqa="query_head")
    tiny.forward(pair.model, cache, [row[:40]])
    fork = cache.select([0])
    cache.mode = "score"
    read = tiny.forward(pair.model, cache, [row[40:]], starts=[40])
    assert torch.allclose(read, tiny.forward(pair.model, fork, [row[40:]], starts=[40]), atol=1e-5)


def test_bytes_are_those_of_the_repeated_cache() -> None:
    pair, row = tiny.pair("llama"), tiny.tokens(60)
    snapshots = []
    for gqa in ("kv_head", "query_head"):
        cache = pair.cache(**SNAPKV, gqa=gqa)
        tiny.forward(pair.model, cache, [row])
        snapshots.append(cache.snapshot())
    one, two = (s["kv_bytes_valid"][0] for s in snapshots)
    assert two == 2 * one, "two query heads for each KV head"
    assert snapshots[1]["kv_bytes_allocated"] == 2 * snapshots[0]["kv_bytes_allocated"]
    assert snapshots[1]["kept_fraction"] == snapshots[0]["kept_fraction"] == [CAPACITY / 60]


@pytest.mark.parametrize("method", ["snapkv", "snapkv_comp", "pyramidkv", "adakv"])
def test_without_groups_both_are_the_same(method: str) -> None:
    pair, rows = tiny.pair("gpt_neox"), [tiny.tokens(60), tiny.tokens(33)]
    caches = [pair.cache(**{**SNAPKV, "method": method}, gqa=gqa) for gqa in ("kv_head", "query_head")]
    for cache in caches:
        tiny.forward(pair.model, cache, rows)
    for a, b in zip(caches[0].stores, caches[1].stores, strict=True):
        assert torch.equal(a.pos, b.pos) and torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    assert "no effect" in caches[1].compression.method.warnings(pair.facts)[0]
    assert not caches[1].compression.method.warnings(tiny.pair("llama").facts)


@pytest.mark.parametrize("method", ["pyramidkv", "adakv"])
def test_budgets_are_of_query_heads_too(method: str) -> None:
    pair, row = tiny.pair("llama"), tiny.tokens(60)
    cache = pair.cache(**{**SNAPKV, "method": method}, gqa="query_head")
    tiny.forward(pair.model, cache, [row])
    held = [[len(head) for head in tiny.kept(cache, layer)] for layer in range(2)]
    assert all(len(layer) == 4 for layer in held)
    assert sum(map(sum, held)) == 2 * 4 * CAPACITY

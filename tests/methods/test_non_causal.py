"""Attention within chunks in both directions, against plain loops in float64, in the prompt and over later cuts."""

from __future__ import annotations

import pytest
import tiny
from methods import plain
from methods.plain import LENGTHS, NAMES, Layer, choose, compare, norm, pooled, softmax

from kv_lm_eval.errors import UserError

CAPACITY, SIZE = 15, 16
NON_CAUSAL = {"method": "non_causal", "max_capacity_prompt": CAPACITY, "chunk_size": SIZE}


def received(layer: Layer, head: int, at: list[int], size: int) -> dict[int, float]:
    """What each token at `at` gets from the queries of its chunk, times the norm of its value."""
    out = dict.fromkeys(at, 0.0)
    for query in range(at[-1] + 1):
        chunk = [t for t in at if t // size == query // size]
        for own in layer.group(head) if chunk else ():
            weights = softmax([layer.logit(own, query, t, scale=1.0) for t in chunk])
            for t, weight in zip(chunk, weights, strict=True):
                out[t] += weight / len(layer.group(head))
    return {t: x * norm(layer.values[head][t]) for t, x in out.items()}


def reference(layer: Layer, size: int = SIZE) -> list[set[int]]:
    out = []
    for head in layer.kv_heads:
        got = received(layer, head, list(range(layer.n)), size)
        out.append(choose(pooled([got[t] for t in range(layer.n)], 3, "avg"), CAPACITY))
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [16, 7, 1, 256])
def test_kept_tokens_are_those_of_kvpress_in_a_padded_batch(name, size):
    compare(name, {**NON_CAUSAL, "chunk_size": size}, lambda layer: reference(layer, size), (60, 41, 24, 32))


def test_the_size_of_chunks_shows():
    layers = plain.layers("llama", tuple(tiny.tokens(60, seed=60)))
    assert len({str([[sorted(h) for h in reference(x, size)] for x in layers]) for size in (16, 15, 7, 256)}) == 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "every"), [(8, 5), (16, 3), (4, 10)])
def test_later_cuts_score_the_newest_chunks_anew_and_remember_the_others(name, size, every):
    """The first layer, whose keys and queries do not depend on what was evicted."""
    pair, row = tiny.pair(name), tiny.tokens(64, seed=64)
    cache = pair.cache(**{**NON_CAUSAL, "chunk_size": size}, compress_every=every)
    tiny.forward(pair.model, cache, [row[:40]])
    layer = plain.layers(name, tuple(row))[0]
    kept, numbers = [], []
    for head in layer.kv_heads:
        numbers.append(received(layer, head, list(range(40)), size))
        kept.append(choose(pooled(list(numbers[head].values()), 3, "avg"), CAPACITY))
    for start in range(40, 64 - every + 1, every):
        assert tiny.kept(cache, 0) == [sorted(head) for head in kept], start
        for t in range(start, start + every):
            tiny.forward(pair.model, cache, [[row[t]]], starts=[t])
        for head in layer.kv_heads:
            at = sorted(kept[head] | set(range(start, start + every)))
            anew = received(layer, head, at, size)
            held = max(0, start - size)  # the first query that is still there
            for t in at:
                if t // size * size >= held:
                    numbers[head][t] = anew[t]
            kept[head] = {at[i] for i in choose(pooled([numbers[head][t] for t in at], 3, "avg"), CAPACITY)}


def test_it_goes_with_ada_pyramids_chunks_and_treatments_of_the_rest():
    pair = tiny.pair("llama")
    for more in (
        {"head_budget": "ada"},
        {"layer_budget": "pyramid"},
        {"compress_every": 3, "evicted": "compensate", "weight": "uniform", "block_size": 5},
        {"evicted": "d2o"},
        {"unit": "chunk", "unit_size": 5},
        {"method": "criticalkv", "scorer": "non_causal"},
    ):
        cache = pair.cache(**{**NON_CAUSAL, **more})
        tiny.forward(pair.model, cache, [tiny.tokens(n, seed=n) for n in LENGTHS])
        for t in range(7):
            logits = tiny.forward(pair.model, cache, [[3 + t]] * 3, starts=[n + t for n in LENGTHS])
            assert logits.isfinite().all()
        left = 7 % more.get("compress_every", 8)
        assert [sum(held[row] for held in cache.held) / 2 for row in range(3)] == [CAPACITY + left] * 3, more


def test_queries_are_held_no_longer_than_they_are_asked_for():
    pair, row = tiny.pair("llama"), tiny.tokens(50)
    once, online = pair.cache(**NON_CAUSAL), pair.cache(**NON_CAUSAL, compress_every=4)
    for cache in (once, online):
        tiny.forward(pair.model, cache, [row])
    assert once.stores[0].queries is None
    assert online.stores[0].queries.shape[2] == SIZE
    for t in range(9):
        tiny.forward(pair.model, online, [[3 + t]], starts=[50 + t])
    assert online.stores[0].queries.shape[2] == SIZE + 1, "those since the last cut, and as many as a chunk has before"


def test_settings_without_sense_are_refused():
    with pytest.raises(UserError, match="chunk_size=0"):
        tiny.compression(**{**NON_CAUSAL, "chunk_size": 0})


def test_rows_of_unlike_lengths_in_one_rectangle_score_as_they_do_alone():
    pair, lengths = tiny.pair("llama"), (60, 41, 24)
    rows = [tiny.tokens(n + 12, seed=n) for n in lengths]

    def run(some: list[int]) -> list[list[list[int]]]:
        cache = pair.cache(**{**NON_CAUSAL, "chunk_size": 7}, compress_every=4)
        tiny.forward(pair.model, cache, [rows[i][: lengths[i]] for i in some])
        cache.gather()
        assert len(cache.segments) == 1
        for t in range(12):
            fed, starts = [[rows[i][lengths[i] + t]] for i in some], [lengths[i] + t for i in some]
            tiny.forward(pair.model, cache, fed, starts=starts)
        return [tiny.kept(cache, 0, row) for row in range(len(some))]

    assert run([0, 1, 2]) == [run([i])[0] for i in range(3)]

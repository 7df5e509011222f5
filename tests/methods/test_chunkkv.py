"""Whole chunks of slots: the budget to the slot, and kvpress's share of the chunks, against plain loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.plain import LENGTHS, NAMES, Layer, compare, norm, pooled
from methods.test_kept_sets import held_by

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.unit import Unit

INF, WINDOW, CAPACITY, SIZE = float("inf"), 4, 17, 5
CHUNKKV = {"method": "chunkkv", "window_size": WINDOW, "kernel_size": 3, "unit_size": SIZE}
Scores = Callable[[Layer, int], list[float]]


def snapkv(layer: Layer, head: int) -> list[float]:
    n, group = layer.n, layer.group(head)
    old = range(n - WINDOW)
    votes = [sum(layer.weights[h][q][t] for h in group for q in range(n - WINDOW, n)) / len(group) for t in old]
    return pooled(votes, 3, "max") + [INF] * WINDOW


def knorm(layer: Layer, head: int) -> list[float]:
    return [-norm(key) for key in layer.keys[head]]


def summed(scores: list[list[float]]) -> list[float]:
    """Over the heads; what always stays counts as the highest of all."""
    highest = max(s for own in scores for s in own if s != INF)
    return [sum(highest if s == INF else s for s in token) for token in zip(*scores, strict=True)]


def best_chunks(total: list[float], size: int) -> list[list[int]]:
    chunks = [list(range(first, min(first + size, len(total)))) for first in range(0, len(total), size)]
    return sorted(chunks, key=lambda c: (-sum(total[t] for t in c) / len(c), c[0]))


def exact(layer: Layer, score: Scores, capacity: int, size: int) -> list[set[int]]:
    """What always stays, whole chunks from the best on, and of the first that does not fit its best slots."""
    scores = [score(layer, head) for head in layer.kv_heads]
    total = summed(scores)
    kept = {t for t, s in enumerate(scores[0]) if s == INF}
    for chunk in best_chunks(total, size):
        for t in sorted(chunk, key=lambda t: (-total[t], t)):
            if len(kept) < capacity:
                kept.add(t)
    return [kept] * len(scores)


def kvpress(layer: Layer, score: Scores, ratio: float, size: int) -> list[set[int]]:
    """A share of the chunks, the last of which may be shorter; nothing is always kept."""
    scores = [score(layer, head) for head in layer.kv_heads]
    chunks = best_chunks(summed(scores), size)
    kept = {t for chunk in chunks[: max(1, int(len(chunks) * (1 - ratio)))] for t in chunk}
    return [kept] * len(scores)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("capacity", "size"), [(17, 5), (20, 5), (16, 3), (20, 20)])
def test_whole_chunks_stay_and_the_budget_is_met(name, capacity, size):
    wanted = {**CHUNKKV, "max_capacity_prompt": capacity, "unit_size": size}
    compare(name, wanted, lambda layer: exact(layer, snapkv, capacity, size), (60, 41, 24, 12))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("capacity", [17, 20])
def test_any_scorer_does(name, capacity):
    wanted = {"method": "knorm", "unit": "chunk", "unit_size": SIZE, "max_capacity_prompt": capacity}
    compare(name, wanted, lambda layer: exact(layer, knorm, capacity, SIZE))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
@pytest.mark.parametrize(("method", "score"), [("chunkkv", snapkv), ("knorm", knorm)])
def test_with_rounding_reference_kept_chunks_are_those_of_kvpress(name, ratio, method, score):
    wanted = {**CHUNKKV} if method == "chunkkv" else {"method": method, "unit": "chunk", "unit_size": SIZE}
    wanted |= {"compression_ratio": ratio, "rounding": "reference"}
    compare(name, wanted, lambda layer: kvpress(layer, score, ratio, SIZE), (60, 41, 39, 24))


def test_numbers_kept_with_rounding_reference_are_counted():
    """The chunk of what is left over is shorter, and stays or goes by its score."""
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in (61, 43, 22)]
    cache = pair.cache(method="knorm", unit="chunk", unit_size=5, compression_ratio=0.5, rounding="reference")
    tiny.forward(pair.model, cache, rows)
    for row in range(3):
        assert [held[row] for held in cache.held] == [len(heads[0]) for heads in held_by(cache, row)]
    for t in range(3):
        logits = tiny.forward(pair.model, cache, [[3 + t]] * 3, starts=[61 + t, 43 + t, 22 + t])
        assert logits.isfinite().all()


@given(st.data())
@settings(derandomize=True, deadline=None, database=None)
def test_ranks_are_those_of_the_loop_whatever_is_empty_tied_or_always_kept(data):
    heads, n, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 24)), data.draw(st.integers(1, 9))
    empty = data.draw(st.integers(0, 5))
    draw = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 0.5, 3.0]), min_size=n, max_size=n)
    scores = [data.draw(draw) for _ in range(heads)]
    always = set(data.draw(st.lists(st.integers(0, n - 1), max_size=3))) if n > 3 else set()
    scores = [[INF if t in always else s for t, s in enumerate(own)] for own in scores]
    padded = torch.tensor([[9.0] * empty + own for own in scores])[None]
    pos = torch.tensor([-1] * empty + list(range(n))).view(1, 1, -1)
    total = summed(scores)
    chunks = best_chunks(total, size)
    order = [t for chunk in chunks for t in sorted(chunk, key=lambda t: (-total[t], t))]
    for rounding in ("exact", "reference"):
        ranked, sizes = Unit("chunk", size, rounding).ranked(padded, pos)
        got = ranked[0, 0, empty:].tolist()
        stays = always if rounding == "exact" else set()
        assert {t for t, s in enumerate(got) if s == INF} == stays
        ours = sorted((t for t in range(n) if t not in stays), key=lambda t: -got[t])
        assert ours == [t for t in order if t not in stays]
        assert sizes[0, : len(chunks)].tolist() == [len(c) for c in chunks] and math.fsum(sizes[0]) == n


def test_it_goes_with_pyramids_later_cuts_treatments_and_query_heads():
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in LENGTHS]
    for more in (
        {"layer_budget": "pyramid"},
        {"compress_every": 3},
        {"compress_every": 3, "evicted": "compensate", "block_size": 5},
        {"evicted": "d2o"},
        {"gqa": "query_head"},
        {"method": "tova", "unit": "chunk"},
        {"method": "criticalkv", "unit": "chunk"},
        {"nbits": 4, "residual_length": 4, "group_size": 4},
    ):
        wanted = {**CHUNKKV, "max_capacity_prompt": CAPACITY, **more}
        if wanted["method"] == "tova":
            wanted = {k: v for k, v in wanted.items() if k not in ("window_size", "kernel_size")}
        cache = pair.cache(**wanted)
        tiny.forward(pair.model, cache, rows)
        assert all(len({str(head) for head in layer}) == 1 for layer in held_by(cache)) or "evicted" in more
        for t in range(7):
            logits = tiny.forward(pair.model, cache, [[3 + t]] * 3, starts=[n + t for n in LENGTHS])
            assert logits.isfinite().all()
        every = cache.compression.schedule.compress_every
        left = 7 % every if every else 7
        assert [sum(held[row] for held in cache.held) / 2 for row in range(3)] == [CAPACITY + left] * 3, more


def test_chunks_of_one_slot_are_slots_scored_by_all_heads():
    pair, row = tiny.pair("llama"), tiny.tokens(50)
    kept = []
    for more in ({}, {"unit": "chunk", "unit_size": 1}):
        cache = pair.cache(method="tova", max_capacity_prompt=14, **more)
        tiny.forward(pair.model, cache, [row])
        kept.append(held_by(cache))
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"method": "snapkv", "unit_size": 5}, "unit_size=5 has no effect without unit=chunk"),
        ({"method": "window", "unit": "chunk"}, "keeps tokens by their place"),
        ({"method": "streaming_llm", "unit": "chunk"}, "keeps tokens by their place"),
        ({"method": "adakv", "unit": "chunk"}, "none could keep more than another"),
        ({"method": "knorm", "unit": "chunk", "unit_size": 0}, "at least 1"),
        ({"method": "knorm", "unit": "chunk", "unit_size": 65}, "no whole chunk would ever fit"),
        ({"method": "knorm", "unit": "word"}, "not one of: token, chunk"),
    ],
    ids=str,
)
def test_settings_without_sense_are_refused(wanted, words):
    with pytest.raises(UserError, match=words):
        tiny.compression(max_capacity_prompt=64, **wanted)


def test_only_chunks_are_among_the_settings():
    assert "unit" not in tiny.compression(method="snapkv", max_capacity_prompt=64).settings()
    found = tiny.compression(method="chunkkv", max_capacity_prompt=64).settings()
    assert (found["unit"], found["unit_size"]) == ("chunk", 20)

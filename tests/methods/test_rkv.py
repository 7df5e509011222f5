"""R-KV against plain loops in float64 over the authors' code."""

from __future__ import annotations

import pytest
import tiny
from methods import plain
from methods.plain import NAMES, Layer, choose, compare, dot, later_cuts, norm, pooled, softmax

from kv_lm_eval.errors import UserError

CAPACITY, WINDOW = 16, 4
RKV = {"method": "rkv", "max_capacity_prompt": CAPACITY, "window_size": WINDOW}


def importance(layer: Layer, head: int, window: int, kernel: int, at: list[int]) -> list[float]:
    """Of the tokens before the window among those at `at`, by the largest logit of a group's heads."""
    old, total = at[:-window], [0.0] * (len(at) - window)
    for query in at[-window:]:
        logits = [max(layer.logit(h, query, t) for h in layer.group(head)) for t in old]
        total = [a + p / window for a, p in zip(total, softmax(logits), strict=True)]
    return pooled(total, kernel, "max")


def redundancy(keys: list[list[float]], threshold: float) -> list[float]:
    n, units = len(keys), [[x / (norm(k) + 1e-8) for x in k] for k in keys]
    mean = [0.0] * n
    for i in range(n):
        row = [0.0 if i == j else dot(units[i], units[j]) for j in range(n)]
        alike = [j for j in range(n) if row[j] > threshold]
        row[max(alike, default=0)] = 0.0
        mean = [m + c / n for m, c in zip(mean, row, strict=True)]
    return softmax(mean)


def scores(layer: Layer, head: int, at: list[int], **settings) -> list[float]:
    window, kernel = settings.get("window_size", WINDOW), settings.get("kernel_size", 7)
    mix, threshold = settings.get("mix_lambda", 0.07), settings.get("similarity_threshold", 0.5)
    votes = importance(layer, head, window, kernel, at)
    same = redundancy([layer.keys[head][t] for t in at], threshold)
    return [mix * a - (1 - mix) * r for a, r in zip(votes, same, strict=False)] + [float("inf")] * window


def reference(layer: Layer, **settings) -> list[set[int]]:
    at = list(range(layer.n))
    return [choose(scores(layer, head, at, **settings), CAPACITY) for head in layer.kv_heads]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mix_lambda": 0.5},
        {"mix_lambda": 1, "kernel_size": 3},
        {"mix_lambda": 0},
        {"similarity_threshold": 0.8},
        {"window_size": 8},
    ],
    ids=str,
)
def test_kept_tokens_are_those_of_the_authors_code_in_a_padded_batch(name, settings):
    compare(name, {**RKV, **settings}, lambda layer: reference(layer, **settings))


def test_the_settings_show():
    layers = [x for n in plain.LENGTHS for x in plain.layers("gpt_neox", tuple(tiny.tokens(n, seed=n)))]
    variants = [{}, {"mix_lambda": 0.5}, {"mix_lambda": 1}, {"mix_lambda": 0}, {"similarity_threshold": 0.8}]
    kept = {str([[sorted(head) for head in reference(x, **v)] for x in layers]) for v in variants}
    assert len(kept) == len(variants)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [1, 7, 16])
@pytest.mark.parametrize("threshold", [-0.3, 0.2, 0.5, 0.8])
def test_blocks_of_cosines_are_all_of_them(name, block, threshold, monkeypatch):
    monkeypatch.setattr("kv_lm_eval.methods.rkv.BLOCK", block)
    settings = {"similarity_threshold": threshold}
    compare(name, {**RKV, **settings}, lambda layer: reference(layer, **settings), (60, 31))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ada", [False, True])
def test_it_goes_on_every_so_many_tokens_of_the_answer_with_what_is_left(name, ada):
    later_cuts(name, RKV, scores, ada)


def test_by_default_it_cuts_every_128_tokens():
    assert tiny.compression(method="rkv", max_capacity_prompt=64).schedule.compress_every == 128


@pytest.mark.parametrize(
    "setting",
    [{"window_size": 0}, {"kernel_size": 4}, {"mix_lambda": 1.5}, {"similarity_threshold": 2}],
)
def test_settings_without_sense_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        tiny.compression(**{**RKV, **setting})

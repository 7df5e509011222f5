"""Numbers by place, against plain loops over tokens."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from kv_lm_eval.stats import curves


@pytest.mark.parametrize("seed", range(5))
def test_distances_are_those_counted_token_by_token(seed):
    draw = random.Random(seed)
    n = draw.randint(1, 60)
    cuts = sorted(draw.sample(range(1, 60), draw.randint(0, 6)))
    first, last = curves.since_first(n, cuts).tolist(), curves.since_last(n, cuts).tolist()
    for t in range(n):
        before = [c for c in cuts if c <= t]
        assert first[t] == (t - cuts[0] if before else -1)
        assert last[t] == (t - before[-1] if before else -1)


def test_each_stretch_has_the_mean_of_its_tokens_and_every_token_is_in_one():
    rng = np.random.default_rng(0)
    values = [rng.random(n) for n in (300, 1, 70)]
    places = [rng.integers(-3, 40, len(v)) for v in values]
    found = curves.by_place(values, places)
    pairs = [(x, p) for v, q in zip(values, places, strict=True) for x, p in zip(v, q, strict=True) if p >= 0]
    assert sum(one["tokens"] for one in found) == len(pairs)
    for one in found:
        inside = [x for x, p in pairs if one["from"] <= p <= one["to"]]
        assert one["tokens"] == len(inside) and one["mean"] == pytest.approx(math.fsum(inside) / len(inside))
        assert one["low"] is None or one["low"] <= one["mean"] <= one["high"]
    assert [(one["from"], one["to"]) for one in found] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 39)]


def test_nothing_to_gather_is_nothing():
    assert curves.by_place([np.ones(3)], [np.full(3, curves.LEFT_OUT)]) == []
    assert curves.by_place([], []) == [] and curves.by_place([np.zeros(0)], [np.zeros(0, int)]) == []

"""Paired statistics against plain loops, exact enumeration, and known coverage."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from kv_lm_eval.stats import paired
from kv_lm_eval.stats.intervals import t_quantile
from kv_lm_eval.stats.paired import AGGREGATIONS, Pair, aggregation_of, compare

BY_NAME = {a.name: a for a in AGGREGATIONS}


def pair(ours, base, name="mean"):
    a = BY_NAME[name]
    return Pair(a.table(ours), a.table(base), a)


def log_likelihoods(seed, n, shift=0.0):
    draw = random.Random(seed)
    return [(-draw.uniform(20, 60) - shift * draw.random(), draw.randint(10, 30)) for _ in range(n)]


def test_every_aggregation_makes_lm_evals_number():
    scores, pairs = [0.0, 1.0, 0.5, 1.0], log_likelihoods(1, 4)
    total, words = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    reported = {
        "mean": (scores, 0.625),
        "percent": ([0.12346, 0.5], 31.17),  # LongBench's two digits
        "perplexity": ([-1.0, -2.0], math.exp(1.5)),
        "weighted_mean": (pairs, total / words),
        "weighted_perplexity": (pairs, math.exp(-total / words)),
        "bits_per_byte": (pairs, -total / words / math.log(2)),
    }
    for name, side in reported.items():
        found = aggregation_of([side])
        assert found is not None and found.name == name


@pytest.mark.parametrize("values", [[("a", "b")], [None, 1.0], [{"x": 1}], [(1.0, 2, 3)], [[0.5, float("nan")]]])
def test_a_metric_of_another_kind_has_no_interval(values):
    assert aggregation_of([(values, 0.5)]) is None


def test_a_run_that_scores_nothing_does_not_hide_a_percentage():
    found = aggregation_of([([0.0, 0.0], 0.0), ([0.5, 0.25], 37.5)])
    assert found is not None and found.name == "percent"


@pytest.mark.parametrize("name", ["mean", "weighted_perplexity", "bits_per_byte"])
@pytest.mark.parametrize("size", [1, 4])
def test_the_interval_is_that_of_a_plain_loop(name, size):
    n = 40
    ours, base = log_likelihoods(2, n, 3.0), log_likelihoods(2, n)
    if name == "mean":
        ours, base = [x for x, _ in ours], [x for x, _ in base]
    aggregation = BY_NAME[name]
    of_document = [i // size for i in range(n)]
    whole, squares = aggregation.value(aggregation.table(ours)) - aggregation.value(aggregation.table(base)), 0.0
    clusters = len(set(of_document))
    for left_out in range(clusters):
        rest = [i for i in range(n) if of_document[i] != left_out]
        sides = [aggregation.value(aggregation.table([side[i] for i in rest])) for side in (ours, base)]
        squares += (sides[0] - sides[1] - whole) ** 2
    half = t_quantile(0.95, clusters - 1) * math.sqrt((clusters - 1) / clusters * squares)
    result = compare([replace(pair(ours, base, name), clusters=np.array(of_document))])
    assert (result.low, result.high) == pytest.approx((whole - half, whole + half), rel=1e-9)
    assert (result.documents, result.changed, result.clusters) == (n, n, clusters)


@pytest.mark.parametrize("size", [1, 3])
def test_the_swap_test_is_that_of_all_swaps(size):
    ours, base = [1, 0, 0, 1, 0, 0, 0, 1, 0] * size, [1, 1, 1, 0, 1, 1, 0, 1, 1] * size
    differences = [a - b for a, b in zip(ours, base, strict=True)]
    by_cluster = [sum(differences[i::9]) for i in range(9)]
    observed, large = abs(sum(differences)), 0.0
    for signs in itertools.product((1, -1), repeat=9):
        found = abs(sum(s * d for s, d in zip(signs, by_cluster, strict=True)))
        large += (found > observed) + 0.5 * (found == observed)
    exact = large / 2**9
    of_document = np.array(list(range(9)) * size)
    assert compare([replace(pair(ours, base), clusters=of_document)]).p == pytest.approx(exact, abs=0.01)


def test_four_losses_of_thirty_are_within_noise_although_their_interval_excludes_zero():
    result = compare([pair([0] * 4 + [1] * 26, [1] * 30)])
    assert result.high < 0 and result.p > 0.05 and result.verdict == "within noise"
    assert compare([pair([0] * 7 + [1] * 23, [1] * 30)]).verdict == "outside noise"


def test_verdicts_where_nothing_can_be_told():
    assert compare([pair([1, 0, 1], [1, 0, 1])]).verdict == "identical"
    assert compare([pair([0] * 5, [1] * 5)]).verdict == "too few documents"
    assert compare([pair([0] * 6, [1] * 6)]).verdict == "outside noise"
    assert paired.Comparison(0.5, reason="no answers").verdict == "unknown"


@pytest.mark.parametrize("n", [12, 40])
def test_two_equal_methods_are_told_apart_in_less_than_one_case_of_twenty(n):
    generator = np.random.default_rng(3)
    outside = 0
    for _ in range(200):
        ours, base = generator.random((2, n)) < 0.7
        outside += compare([pair(list(map(float, ours)), list(map(float, base)))]).verdict == "outside noise"
    assert outside <= 16  # 5 % of 200 and two standard deviations


def test_the_same_numbers_every_time():
    ours, base = log_likelihoods(2, 30, 3.0), log_likelihoods(2, 30)
    first = compare([pair(ours, base, "weighted_perplexity")])
    assert compare([pair(ours, base, "weighted_perplexity")]) == first


def test_a_group_is_the_weighted_sum_and_draws_within_its_tasks():
    small, large = pair([0.0, 1.0, 0.0], [1.0, 1.0, 0.0]), pair([1.0] * 60, [1.0] * 30 + [0.0] * 30)
    macro = compare([small, large], [0.5, 0.5])
    assert macro.difference == pytest.approx(0.5 * -1 / 3 + 0.5 * 0.5)
    assert macro.documents == 63 and macro.changed == 31
    variances = [0.25 * np.var(side.ours[:, 0] - side.base[:, 0], ddof=1) / len(side.ours) for side in (small, large)]
    degrees = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 59)
    half = t_quantile(0.95, math.floor(degrees)) * sum(variances) ** 0.5
    assert (macro.low, macro.high) == pytest.approx((macro.difference - half, macro.difference + half))


def test_tasks_about_the_same_texts_are_drawn_together():
    """Two tasks that agree on every text are no more evidence than one."""
    ours, base = [0.0, 1, 1, 0, 1, 0, 0, 1] * 2, [1.0, 1, 0, 1, 1, 1, 0, 1] * 2
    of_document = np.arange(16) % 8
    one = replace(pair(ours, base), clusters=of_document)
    alone, both = compare([one]), compare([one, one], [0.5, 0.5])
    assert (both.low, both.high, both.p, both.clusters) == pytest.approx((alone.low, alone.high, alone.p, 8))
    apart = compare([one, replace(one, clusters=of_document + 8)], [0.5, 0.5])
    assert apart.clusters == 16 and apart.high - apart.low < 0.8 * (alone.high - alone.low)


def test_the_error_of_one_run_is_that_of_its_texts():
    scores = BY_NAME["mean"].table([0.0, 0, 0, 1, 1, 1, 1, 0, 1])
    apart = paired.standard_error(scores, BY_NAME["mean"], np.arange(9))
    assert apart == pytest.approx(np.std(scores[:, 0], ddof=1) / 3)
    assert paired.standard_error(scores, BY_NAME["mean"], np.arange(9) // 3) == pytest.approx(
        np.std([0, 1, 2 / 3], ddof=1) / 3**0.5
    )
    assert paired.standard_error(scores, BY_NAME["mean"], np.zeros(9, int)) is None


def test_many_documents_need_fewer_draws():
    n = 30_000
    generator = np.random.default_rng(0)
    base = (generator.random(n) < 0.5).astype(float)
    ours = np.where(generator.random(n) < 0.02, 0.0, base)
    result = compare([pair(list(ours), list(base))])
    assert result.verdict == "outside noise" and result.low < result.difference < result.high < 0

"""Each of llama.cpp's statistics against its definition, in plain loops; numbers for numbers that can be told apart."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from kv_lm_eval.stats import fidelity


def mean_and_uncertainty(values):
    """llama.cpp's mean_and_uncertainty: from the sum and the sum of squares."""
    n = len(values)
    mean = math.fsum(values) / n
    return mean, math.sqrt(max(0.0, math.fsum(v * v for v in values) / n - mean * mean) / (n - 1))


def covariance(a, b):
    n = len(a)
    return (math.fsum(x * y for x, y in zip(a, b, strict=True)) / n - math.fsum(a) / n * math.fsum(b) / n) / (n - 1)


def percentile(values, fraction):
    values = sorted(values)
    if fraction >= 1:
        return values[-1]
    p = fraction * (len(values) - 1)
    i = int(p)
    p -= i
    return (1 - p) * values[i] + p * values[min(i + 1, len(values) - 1)]


def draw(n, seed=0):
    rng = random.Random(seed)
    base = [-rng.expovariate(0.5) for _ in range(n)]
    ours = [min(0.0, b + rng.gauss(-0.05, 0.3)) for b in base]
    kl = [rng.expovariate(30.0) for _ in range(n)]
    same = [rng.random() < 0.9 for _ in range(n)]
    return kl, base, ours, same


@pytest.mark.parametrize("n", [12, 101, 1000])
def test_every_statistic_is_llama_cpps(n):
    kl, base, ours, same = draw(n)
    got = fidelity.of_tokens(*map(np.array, (kl, base, ours, same)))
    nll, nll_base = [-x for x in ours], [-x for x in base]
    log_ppl, log_ppl_base, cov = mean_and_uncertainty(nll), mean_and_uncertainty(nll_base), covariance(nll, nll_base)
    ppl, ppl_base = math.exp(log_ppl[0]), math.exp(log_ppl_base[0])
    ratio_error = math.sqrt(log_ppl[1] ** 2 + log_ppl_base[1] ** 2 - 2 * cov)
    ratio = math.exp(log_ppl[0] - log_ppl_base[0])
    difference_error = math.sqrt((ppl * log_ppl[1]) ** 2 + (ppl_base * log_ppl_base[1]) ** 2 - 2 * ppl * ppl_base * cov)
    delta = [math.exp(q) - math.exp(p) for p, q in zip(base, ours, strict=True)]
    square = mean_and_uncertainty([d * d for d in delta])
    share = sum(same) / n

    def pair(estimate):
        return estimate.value, estimate.error

    assert got.tokens == n
    assert pair(got.ppl) == pytest.approx((ppl, ppl * log_ppl[1]), rel=1e-9)
    assert pair(got.ppl_base) == pytest.approx((ppl_base, ppl_base * log_ppl_base[1]), rel=1e-9)
    assert got.correlation == pytest.approx(cov / (log_ppl[1] * log_ppl_base[1]), rel=1e-9)
    assert pair(got.log_ppl_ratio) == pytest.approx((log_ppl[0] - log_ppl_base[0], ratio_error), rel=1e-6)
    assert pair(got.ppl_ratio) == pytest.approx((ratio, ratio * ratio_error), rel=1e-6)
    assert pair(got.ppl_difference) == pytest.approx((ppl - ppl_base, difference_error), rel=1e-6)
    assert pair(got.kl) == pytest.approx(mean_and_uncertainty(kl), rel=1e-9)
    assert pair(got.delta_p) == pytest.approx(mean_and_uncertainty(delta), rel=1e-9)
    assert pair(got.delta_p_rms) == pytest.approx(
        (math.sqrt(square[0]), 0.5 / math.sqrt(square[0]) * square[1]), rel=1e-9
    )
    assert pair(got.same_top) == pytest.approx((share, math.sqrt(share * (1 - share) / (n - 1))), rel=1e-12)
    for spread, values, percents in (
        (got.kl_spread, kl, fidelity.KL_PERCENTILES),
        (got.delta_p_spread, delta, fidelity.DELTA_P_PERCENTILES),
    ):
        assert (spread.largest, spread.smallest) == (max(values), min(values))
        assert spread.percentiles == pytest.approx({p: percentile(values, p / 100) for p in percents}, rel=1e-9)
    ordered = sorted(kl)
    median = ordered[n // 2] if n % 2 else 0.5 * (ordered[n // 2] + ordered[n // 2 - 1])
    assert got.kl_spread.percentiles[50.0] == pytest.approx(median)


def test_the_error_of_the_ratio_is_that_of_repeated_draws():
    """Pairs of tokens drawn anew: the spread of the log ratio over draws is what one draw says of itself."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        base = -rng.exponential(2.0, 300)
        ours = base + rng.normal(-0.05, 0.3, 300)
        found.append(fidelity.of_tokens(np.zeros(300), base, ours, np.ones(300, bool)))
    ratios = [one.log_ppl_ratio.value for one in found]
    told = np.mean([one.log_ppl_ratio.error for one in found])
    assert told == pytest.approx(np.std(ratios), rel=0.12)
    apart = np.mean(
        [math.hypot(one.ppl.error / one.ppl.value, one.ppl_base.error / one.ppl_base.value) for one in found]
    )
    assert apart > 5 * told  # what the error would be of two unrelated texts


def test_equal_runs_and_single_tokens_have_no_false_error():
    lp = -np.arange(1.0, 21.0)
    same = fidelity.of_tokens(np.zeros(20), lp, lp, np.ones(20, bool))
    assert same.kl == fidelity.Estimate(0.0, 0.0) and same.ppl_ratio == fidelity.Estimate(1.0, 0.0)
    assert same.correlation == pytest.approx(1) and same.delta_p_rms == fidelity.Estimate(0.0, 0.0)
    assert same.ppl_difference.error == pytest.approx(0, abs=1e-12)
    one = fidelity.of_tokens(np.array([0.5]), lp[:1], lp[:1] - 1, np.array([False]))
    assert one.kl == fidelity.Estimate(0.5, None) and one.same_top == fidelity.Estimate(0.0, None)
    assert one.correlation is None and one.kl_spread.percentiles[99.9] == 0.5


def test_a_token_that_the_method_rules_out_makes_the_mean_infinite_and_the_median_not():
    got = fidelity.of_tokens(
        np.array([0.1, np.inf, 0.2]), np.array([-1.0, -1, -1]), np.array([-1.0, -np.inf, -1]), np.ones(3, bool)
    )
    assert got.kl == fidelity.Estimate(math.inf, None) and got.kl_spread.percentiles[50.0] == pytest.approx(0.2)
    assert got.ppl.value == math.inf and got.delta_p.value == pytest.approx(-math.exp(-1) / 3)

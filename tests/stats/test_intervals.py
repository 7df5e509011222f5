"""Intervals against scipy and plain loops, and how often they miss where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from kv_lm_eval.stats import blocks, intervals


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 10, 29, 30, 199, 1000, 1001, 10**6])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.9833, 0.999])
def test_students_quantile(df: int, level: float) -> None:
    t = pytest.importorskip("scipy.stats").t
    assert intervals.t_quantile(level, df) == pytest.approx(t.ppf((1 + level) / 2, df), rel=1e-6)


def test_the_interval_of_a_mean_is_students_and_that_of_a_ratio_the_same_where_all_counts_are() -> None:
    values = np.random.default_rng(0).normal(size=12)
    found, ratio = intervals.of_mean(values), intervals.of_ratio(values * 5, np.full(12, 5.0))
    half = intervals.t_quantile(0.95, 11) * values.std(ddof=1) / 12**0.5
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((found.mean, found.low, found.high))
    assert intervals.of_mean([1.0]).low is None and intervals.of_ratio(np.ones(1), np.ones(1)).high is None


def test_welchs_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=30), rng.normal(0, 4, 9)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    found = intervals.of_difference(a, b)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=0.02)  # whole degrees
    assert found.low <= expected.low and found.high >= expected.high


# ---------------------------------------------------------------------------------------------- tokens


def test_blocks_never_cross_documents_are_alike_in_length_and_leave_out_what_was_not_scored() -> None:
    documents = [np.array([1.0, 2, np.nan, 4, 5]), np.array([6.0]), np.array([np.nan])]
    sums, counts = blocks.cut(documents, 2)
    assert sums.tolist() == [3, 9, 6] and counts.tolist() == [2, 2, 1]
    assert blocks.cut([np.ones(2100)], 512)[1].tolist() == [525] * 4  # no scrap of 52 tokens
    assert blocks.interval(documents)["mean"] == pytest.approx((1 + 2 + 4 + 5 + 6) / 5)


def test_the_size_of_a_block_follows_the_length() -> None:
    assert [blocks.size_for(n) for n in (1, 500, 1600, 5000, 20_000, 200_000)] == [32, 32, 64, 256, 1024, 8192]


def test_few_tokens_give_no_interval_and_say_so_and_nothing_gives_no_mean() -> None:
    short = blocks.interval([np.ones(200)])
    assert (short["mean"], short["low"], short["units"]) == (1, None, 6) and "6 blocks of 32 tokens" in short["reason"]
    assert blocks.interval([np.ones(300)])["low"] == 1
    assert blocks.interval([np.ones(3000)], 512)["low"] is None
    assert blocks.interval([])["mean"] is None and blocks.interval([np.full(9, np.nan)])["units"] == 0


def test_six_texts_are_observations_and_fewer_are_cut_into_blocks() -> None:
    values = [np.full(400, float(i % 2)) for i in range(12)]
    assert blocks.in_words(blocks.interval(values)) == "12 texts"
    three = blocks.interval(values, texts=[i % 3 for i in range(12)])
    assert blocks.in_words(three) == "24 blocks of 256 tokens"
    assert blocks.in_words(blocks.interval(values, texts=[i // 2 for i in range(12)])) == "6 texts"


def missed(rng: np.random.Generator, texts: int, windows: int, shared: float, repeats: int = 400) -> float:
    """Share of intervals without the truth, where a share of the variance is the text's."""
    out = 0
    for _ in range(repeats):
        of_text, own = rng.normal(size=texts), rng.normal(size=(texts, windows))
        means = np.sqrt(shared) * of_text[:, None] + np.sqrt(1 - shared) * own
        values = [np.full(64, m) for row in means for m in row]
        found = blocks.interval(values, texts=np.repeat(np.arange(texts), windows).tolist())
        out += not found["low"] <= 0 <= found["high"]
    return out / repeats


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("texts", [10, 30])
def test_windows_of_one_text_are_not_counted_as_texts_of_their_own(texts: int, shared: float) -> None:
    assert 0.03 <= missed(np.random.default_rng(4), texts, 6, shared) <= 0.07


@pytest.mark.parametrize("dependence", [0.0, 0.9, 0.98])
def test_neighbouring_tokens_may_be_alike(dependence: float) -> None:
    """One text of 5,000 tokens whose difficulty drifts: as often as it says, where single tokens miss most times."""
    rng, out, naive, repeats = np.random.default_rng(5), 0, 0, 300
    for _ in range(repeats):
        steps = rng.normal(size=5000)
        drift = steps.copy()
        for i in range(1, 5000):
            drift[i] += dependence * drift[i - 1]
        found = blocks.interval([drift])
        out += not found["low"] <= 0 <= found["high"]
        naive += abs(drift.mean()) > 1.96 * drift.std() / 5000**0.5
    assert 0.02 <= out / repeats <= 0.12  # 0.98: alike over 100 tokens
    assert dependence == 0 or naive > 0.5 * repeats

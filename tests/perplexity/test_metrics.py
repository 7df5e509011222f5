"""Intervals and spikes on synthetic data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from kv_lm_eval.metrics.perplexity import block_bootstrap, blocks, count_words, percent
from kv_lm_eval.metrics.spikes import around_events, control_starts, spikes, usable_horizon, window_statistics


def correlated(rng, tokens, block, shared):
    """Unit noise a token, and noise of standard deviation `shared` that all tokens of a block have in common."""
    return rng.normal(size=tokens) + np.repeat(rng.normal(0, shared, tokens // block + 1), block)[:tokens]


def test_blocks_never_cross_documents_and_leave_out_what_was_not_scored():
    documents = [np.array([1.0, 2, np.nan, 4, 5]), np.array([6.0]), np.array([np.nan])]
    sums, counts = blocks(documents, 2)
    assert sums.tolist() == [3, 4, 5, 6] and counts.tolist() == [2, 1, 1, 1]
    assert block_bootstrap(documents, 2)["mean"] == pytest.approx((1 + 2 + 4 + 5 + 6) / 5)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, hits, naive = np.random.default_rng(0), 0, 0
    for _ in range(200):
        values = correlated(rng, 64 * 40, 64, 0.5) + 0.25
        found = block_bootstrap([values], 64, draws=400)
        hits += found["low"] <= 0.25 <= found["high"]
        tokenwise = 1.96 * values.std() / len(values) ** 0.5
        naive += abs(values.mean() - 0.25) <= tokenwise
    assert 175 <= hits <= 200  # 95 % of 200 is 190
    assert naive < 120  # what treating tokens as independent would have given


def test_few_blocks_give_no_interval_and_nothing_gives_no_mean():
    assert block_bootstrap([np.ones(3000)])["low"] is None
    assert block_bootstrap([np.ones(3000)])["mean"] == 1
    assert block_bootstrap([]) == {"mean": None, "low": None, "high": None, "blocks": 0}
    assert percent(0.1) == pytest.approx(10.517, abs=1e-3) and percent(None) is None


def test_words_are_counted_as_lm_eval_counts_them():
    assert count_words("a b\n c") == 3 and count_words(" a ") == 3


EVENTS = list(range(99, 3000, 32))


def noise(seed):
    """Heavy-tailed differences around zero, harder stretches of text included."""
    rng = np.random.default_rng(seed)
    return rng.standard_t(4, 3000) * 0.05 * np.repeat(rng.uniform(0.5, 3, 30), 100)


@pytest.mark.parametrize("seed", range(6))
def test_noise_alone_is_no_spike(seed):
    found = spikes(noise(seed), EVENTS)
    assert found["verdict"] == "no spike", found["reason"]
    assert found["horizon"] == 16 and found["windows"]["event"] >= 90


@pytest.mark.parametrize("seed", range(3))
def test_harder_tokens_after_each_event_are_a_spike(seed):
    delta = noise(seed)
    for e in EVENTS:
        delta[e + 1 : e + 5] += np.array([0.4, 0.3, 0.2, 0.1])[: len(delta[e + 1 : e + 5])]
    found = spikes(delta, EVENTS)
    assert found["verdict"] == "spike"
    area = found["statistics"]["area"]["minus_middle"]
    assert area["low"] < 1.0 < area["high"] + 0.3  # 0.4 + 0.3 + 0.2 + 0.1


def test_a_run_that_is_worse_everywhere_has_no_spike():
    assert spikes(noise(0) + 0.5, EVENTS)["verdict"] == "no spike"


def test_a_rise_before_the_prune_is_no_spike_after_it():
    sawtooth = np.zeros(3000)
    for e in EVENTS:
        sawtooth[e - 12 : e + 1] = np.linspace(0, 0.6, 13)
    assert spikes(noise(1) + sawtooth, EVENTS)["verdict"] == "no spike"


def test_too_few_events_or_one_at_every_token_is_said():
    assert spikes(noise(0), EVENTS[:4])["verdict"] == "too few events"
    assert "every token" in spikes(noise(0), list(range(100, 200)))["reason"]


def test_windows_against_plain_loops():
    delta = np.array([0, 0.5, -1, 0.2, 0.3, 0.05, 0.2, 9])
    got = window_statistics(delta, [1, 3], 4, 0.1)
    assert got["peak"].tolist() == [0.5, 0.3] and got["area"] == pytest.approx([1.0, 0.75])
    assert got["width"].tolist() == [2, 2] and got["mean"] == pytest.approx([0, 0.1875])
    assert usable_horizon([10, 20, 31], 16) == 5 and usable_horizon([3], 16) == 16
    events, tokens, horizon = [4, 14], 24, 3
    taken = {i for e in events for i in range(e + 1, e + 1 + horizon)}
    expected = [s for s in range(5, tokens - horizon + 1) if not taken & set(range(s, s + horizon))]
    assert control_starts(events, tokens, horizon) == expected


def test_the_picture_is_the_mean_at_each_distance():
    delta = np.arange(20.0)
    got = around_events(delta, [5, 10, 19], before=2, after=3)
    assert got["distance"] == [-2, -1, 0, 1, 2, 3]
    assert got["mean"] == [5.5, 6.5, 7.5, 8.5, 9.5, 10.5]
    assert all(low <= m <= high for low, m, high in zip(got["low"], got["mean"], got["high"], strict=True))

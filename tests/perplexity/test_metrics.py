"""Counting, and spikes on synthetic data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from kv_lm_eval.metrics.perplexity import count_words, percent
from kv_lm_eval.metrics.spikes import around_events, control_starts, spikes, usable_horizon, window_statistics


def test_a_difference_in_nats_is_a_change_in_per_cent():
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


def lazy(seed, better, period=32, tokens=4000, noise=0.15):
    """A cache pruned every `period` tokens, never worse than one pruned at every token: the more it holds, the better.

    Args:
        better: nats that a full period of slots more is worth.
    """
    events = list(range(255, tokens, period))
    extra = np.array([0 if i <= events[0] else (i - events[0] - 1) % period for i in range(tokens)])
    return np.random.default_rng(seed).normal(0, noise, tokens) - better * extra / period, events


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("better", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("period", [16, 32, 64])
def test_a_saw_tooth_that_only_ever_helps_is_no_spike(seed, better, period):
    delta, events = lazy(seed, better, period)
    found = spikes(delta, events)
    assert found["verdict"] == "no spike", found
    assert better < 0.05 or seed or "not above that of a cache with as many slots" in found["reason"]


def test_saw_teeth_and_noise_are_called_spikes_less_often_than_the_level_says():
    said = sum(spikes(*lazy(seed, better)[0:2])["verdict"] == "spike" for seed in range(60) for better in (0.0, 0.05))
    assert said <= 6  # 5 % of 120


@pytest.mark.parametrize("shape", [[0.4, 0.3, 0.2, 0.1], [0.5], [0.1] * 16])
def test_a_spike_on_top_of_the_saw_tooth_is_found(shape):
    found = 0
    for seed in range(10):
        delta, events = lazy(seed, 0.05)
        for e in events:
            delta[e + 1 : e + 1 + len(shape)] += np.array(shape)[: max(0, len(delta) - e - 1)]
        found += spikes(delta, events)["verdict"] == "spike"
    assert found >= 9


def test_against_the_full_cache_the_run_at_equal_slots_decides():
    """The full cache is better everywhere, most of all after a prune: that is what fewer slots cost, not a spike."""
    delta, events = lazy(0, 0.05)
    assert spikes(delta + 0.3, events)["verdict"] == "spike", "what it would be called without"
    assert spikes(delta + 0.3, events, equal=delta)["verdict"] == "no spike"


def test_random_windows_do_not_overlap_and_a_horizon_of_any_length_works():
    delta, events = lazy(1, 0.0, period=7, tokens=600)
    for horizon in (1, 2, 3, 16):
        found = spikes(delta, events, horizon=horizon)
        assert found["horizon"] == min(horizon, 3) and list(found["above_equal_slots"])[-1] == str(min(horizon, 3))


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

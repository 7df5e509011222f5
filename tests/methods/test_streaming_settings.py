"""Settings of the streaming family: what is refused, what is warned of, and that a total is a total."""

from __future__ import annotations

import re

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_lm_eval.engine.streaming import visible_slots
from kv_lm_eval.errors import UserError


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 6), st.integers(0, 9), st.integers(0, 9), st.integers(1, 30), st.integers(0, 20), st.integers(0, 40),
    st.integers(1, 20), st.integers(1, 300),
)  # fmt: skip
def test_a_total_budget_is_never_passed_and_is_reached(
    sinks: int, overlap: int, refresh: int, every: int, slack: int, drop: int, window: int, tokens: int
) -> None:
    sinks = max(sinks, 1 if refresh else 0)
    total = sinks + overlap + refresh + max(slack, every) + window
    values = {
        "n_sink": sinks, "overlap": overlap, "compress_every": every, "cache_slack": slack, "max_drop": drop,
        "refresh_budget": refresh, "refresh_policy": "uniform" if refresh else "none", "total_budget": total,
    }  # fmt: skip
    compression = tiny.compression(method="streaming_llm", **values)
    slots, _ = visible_slots(compression, tokens, 0, [0])
    assert int(slots.max()) <= total
    if tokens >= total and every >= slack:
        assert int(slots.max()) == total, "the lazy growth is part of the total, and uses it"


def test_overlap_under_a_total_is_the_same_cache_as_a_longer_window() -> None:
    plain = tiny.compression(method="streaming_llm", total_budget=64, compress_every=8)
    overlapping = tiny.compression(method="streaming_llm", total_budget=64, compress_every=8, overlap=16)
    assert plain.budget == overlapping.budget


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_size": 8, "total_budget": 32}, "both fix the window"),
        ({"total_budget": 32, "max_capacity_prompt": 20}, "total_budget=32 both fix the budget"),
        ({"total_budget": 20, "compress_every": 16}, "leaves a window of 0.*at least 21"),
        ({"max_capacity_prompt": 20, "overlap": 4}, "give window_size or total_budget"),
        ({"window_size": 8, "mode": "mit", "compress_every": 4}, "compress_every=1; compress_every=4 is not in it"),
        ({"window_size": 8, "mode": "mit", "positions": "absolute"}, "positions=in_cache"),
        ({"window_size": 8, "refresh_budget": 4}, "refresh_policy=uniform, or neither"),
        ({"window_size": 8, "refresh_policy": "uniform"}, "say different things"),
        ({"window_size": 8, "refresh_budget": 4, "refresh_policy": "uniform", "n_sink": 0}, "n_sink of at least 1"),
        ({"window_size": 8, "trigger": "clock", "cache_slack": 4}, "cache_slack=4 has no effect"),
        ({"window_size": 8, "max_drop": -1}, "max_drop=-1 is negative"),
        ({"window_size": 8, "overlap": -1}, "overlap=-1 is negative"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.compression(method="streaming_llm", **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compress_every": 8, "cache_slack": 4, "max_drop": 8}, "max_drop=8 has no effect: it is not below"),
        ({"compress_every": 8, "max_drop": 4}, "max_drop=4 has no effect: it comes with cache_slack=0"),
        ({"compress_every": 8, "cache_slack": 4}, "cache_slack=4 only reserves budget"),
        ({"compress_every": 8, "cache_slack": 2, "max_drop": 3}, "without bound.*at most cache_slack=2.*drops 6"),
        ({"compress_every": 600}, "past the 512 positions"),
        ({"refresh_budget": 2, "refresh_policy": "uniform"}, "negative control"),
    ],
    ids=str,
)
def test_settings_that_do_not_do_what_they_say_are_warned_of(values: dict[str, object], message: str) -> None:
    compression = tiny.compression(method="streaming_llm", window_size=16, **values)
    warnings = compression.warnings(tiny.pair("llama").facts)
    assert any(re.search(message, w) for w in warnings), warnings


def test_sound_settings_warn_of_nothing() -> None:
    facts = tiny.pair("llama").facts
    for values in ({}, {"compress_every": 8}, {"compress_every": 8, "cache_slack": 6, "max_drop": 4}, {"mode": "mit"}):
        assert tiny.compression(method="streaming_llm", window_size=16, **values).warnings(facts) == []

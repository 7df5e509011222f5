"""The upper limit of a mean of skewed losses: how often it is below the truth, and what else would be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from kv_lm_eval.stats import betting, intervals, limits

Draw = Callable[[np.random.Generator, int], np.ndarray]
ALPHA, REPEATS = 0.05, 300


def even(losses: np.ndarray) -> np.ndarray:
    return betting.weighted(losses)


def texts(rng: np.random.Generator, n: int) -> np.ndarray:
    """Texts of 50 to 500 tokens, each with a level of its own, and tokens that scatter about it."""
    tokens = rng.integers(50, 500, n).astype(float)
    level = rng.gamma(2.0, 0.5, n)
    return np.stack([tokens * level * rng.gamma(tokens, 1 / tokens), tokens], axis=1)


TRUTHS: dict[str, Draw] = {  # all of mean 1
    "even": lambda rng, n: even(1 + 0.3 * rng.normal(size=n)),
    "exponential": lambda rng, n: even(rng.exponential(1.0, n)),
    "lognormal": lambda rng, n: even(rng.lognormal(-0.125, 0.5, n)),
    "lognormal, wide": lambda rng, n: even(rng.lognormal(-0.32, 0.8, n)),
    "unequal texts": texts,
}


def missed(limit: Callable[[np.ndarray, float], float], draw: Draw, n: int, alpha: float = ALPHA) -> float:
    rng = np.random.default_rng(n)
    return float(np.mean([limit(draw(rng, n), alpha) < 1 for _ in range(REPEATS)]))


def students(losses: np.ndarray, alpha: float) -> float:
    found = intervals.of_ratio(*losses.T, level=1 - 2 * alpha)
    assert found.high is not None
    return found.high


@pytest.mark.parametrize("name", sorted(TRUTHS))
@pytest.mark.parametrize("n", [16, 40])
def test_the_limit_is_below_the_truth_as_often_as_it_says(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DRAWS", 1000)
    slack = 1.7 * math.sqrt(ALPHA * (1 - ALPHA) / REPEATS)  # chance would pass it once in twenty
    assert missed(limits.upper_limit, TRUTHS[name], n) <= ALPHA + slack


def test_students_limit_and_tokens_taken_for_independent_ones_are_not() -> None:
    assert missed(students, TRUTHS["exponential"], 16) > 0.085

    def by_token(rng: np.random.Generator, n: int) -> np.ndarray:
        return np.concatenate([np.full((20, 2), (level, 1.0)) for level in rng.exponential(1.0, n)])

    assert missed(students, by_token, 16) > 0.25


def test_it_is_not_so_wide_that_nothing_could_be_shown() -> None:
    rng = np.random.default_rng(3)
    found = [limits.upper_limit(TRUTHS["lognormal"](rng, 40), ALPHA) for _ in range(100)]
    assert 1.1 < np.mean(found) < 1.27  # Student's is 1.15


def test_what_it_is_made_of() -> None:
    rng = np.random.default_rng(4)
    losses = texts(rng, 20)
    assert limits.upper_limit(losses, ALPHA) >= students(losses, ALPHA) * (1 - 1e-2)
    assert limits.upper_limit(losses * 3, ALPHA) == pytest.approx(limits.upper_limit(losses, ALPHA))  # of the weights
    scaled = losses * np.array([2.0, 1.0])
    assert limits.upper_limit(scaled, ALPHA) == pytest.approx(2 * limits.upper_limit(losses, ALPHA))
    assert limits.upper_limit(even(np.full(20, 0.25)), ALPHA) == 0.25
    assert limits.upper_limit(even(np.ones(1)), ALPHA) == math.inf
    assert limits.upper_limit(even(np.array([1.0, math.inf, 1.0])), ALPHA) == math.inf
    assert limits.lower_limit(losses, ALPHA) < betting.mean(losses) < limits.upper_limit(losses, ALPHA)


def test_the_number_that_it_would_take_is_about_the_one_that_it_takes() -> None:
    rng = np.random.default_rng(5)
    few = texts(rng, 24)
    tolerance = 1.2
    asked = limits.needed(few, limits.upper_limit(few, ALPHA), tolerance)
    shown = []
    for _ in range(20):
        more = texts(rng, asked)
        shown.append(limits.upper_limit(more, ALPHA) <= tolerance)
    assert asked > 24 and 0.2 < np.mean(shown) < 0.9  # by half of the draws, were the mean of the few the true one
    assert limits.needed(few, 2.0, betting.mean(few)) is None and limits.needed(few, math.inf, 9.0) is None


def test_bets_say_how_many_they_would_take() -> None:
    rng = np.random.default_rng(6)
    losses = (rng.random(40) < 0.02).astype(float)
    asked = betting.needed(losses, 0.1, 0.01)
    assert betting.evidence_within(losses, 0.1) < -math.log(0.01) and asked > 40
    as_these = np.resize(losses, 4 * asked)
    enough = next(n for n in range(1, len(as_these)) if betting.evidence_within(as_these[:n], 0.1) >= -math.log(0.01))
    assert 0.5 * enough <= asked <= 1.5 * enough
    assert betting.needed(np.full(40, 0.3), 0.1, 0.01) is None

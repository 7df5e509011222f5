"""The largest mean that few skewed observations leave possible: a one-sided limit for losses that have no upper end.

A divergence is never negative and has no largest value: few texts carry the mean. Student's limit is then too low,
since a sample without such texts has both a small mean and a small spread (tests/stats measures 8 to 15 % of misses
where 5 % are claimed). Here the distribution of (mean - truth) / error is that of the sample itself, drawn again with
replacement, cluster by cluster. Small samples are less skewed than what they are drawn from, so that its quantile is
taken at half the chance of an error; and the limit is never below Student's.

What it holds for: 16 clusters or more whose losses spread about as far as they are large (exponential), of whatever
sizes. Heavier tails are missed a little more often (lognormal with sigma 1: 7 % for 5), and failures that hardly any
sample of this size would show are not seen at all: no limit can without knowing the largest loss (betting.py).

Paper: Efron 1982 and Hall 1988 (bootstrap-t). Deviations: half of alpha; not below Student's; fixed
draws.
"""

from __future__ import annotations

import math

import numpy as np

from kv_lm_eval.stats import betting
from kv_lm_eval.stats.betting import Losses
from kv_lm_eval.stats.intervals import t_quantile

FEWEST = 16  # clusters
SEED, DRAWS = 1234, 4000


def upper_limit(losses: Losses, alpha: float) -> float:
    """The mean loss is at most this with confidence 1 - alpha; infinite of fewer than two clusters.

    Args:
        losses: [n] or [n, 2], a loss times its weight and the weight, as in betting.py; any weights above 0.
    """
    sums, weights = betting.weighted(losses).T
    n, mean = len(sums), betting.mean(losses)
    if n < 2 or not np.isfinite(sums).all():
        return math.inf
    error = _error(sums, weights)
    if error <= 1e-12 * abs(mean):
        return mean
    drawn = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)
    total, weight = drawn @ sums, drawn @ weights
    ratio = total / weight
    squares = drawn @ sums**2 - 2 * ratio * (drawn @ (sums * weights)) + ratio**2 * (drawn @ weights**2)
    spread = np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / weight
    # a draw of one cluster n times has no spread: it says nothing of the error
    t = (ratio - mean)[spread > 1e-9 * error] / spread[spread > 1e-9 * error]
    least = -float(np.quantile(t, alpha / 2)) if len(t) else math.inf
    return mean + max(least, t_quantile(1 - 2 * alpha, n - 1)) * error


def lower_limit(losses: Losses, alpha: float) -> float:
    """The mean loss is at least this, by Student's t; minus infinity of fewer than two clusters."""
    sums, weights = betting.weighted(losses).T
    if len(sums) < 2:
        return -math.inf
    return betting.mean(losses) - t_quantile(1 - 2 * alpha, len(sums) - 1) * _error(sums, weights)


def needed(losses: Losses, limit: float, tolerance: float) -> int | None:
    """Clusters with which the limit would be at the tolerance, were the next ones like these; None: no number would.

    The limit's distance from the mean shrinks with the square root of their number.
    """
    mean = betting.mean(losses)
    if not mean < tolerance or not math.isfinite(limit):
        return None
    return max(FEWEST, math.ceil(len(losses) * ((limit - mean) / (tolerance - mean)) ** 2))


def _error(sums: np.ndarray, weights: np.ndarray) -> float:
    """Standard error of the weighted mean, by linearisation."""
    n = len(sums)
    left = sums - sums.sum() / weights.sum() * weights
    return float(np.sqrt((left**2).sum() * n / (n - 1)) / weights.sum())

"""Is a mean loss within a tolerance? Tests by betting, for scores in a known range and any number of looks.

A loss is score(full) - score(setting) on one observation, in [-1, 1]. For the claim "mean loss <= tolerance" we bet
against its opposite: capital 1 is multiplied, observation by observation, by 1 + stake * (tolerance - loss). Were the
true mean above the tolerance, every factor would be 1 or less on average, so that the capital would ever reach 1/alpha
with a probability of at most alpha (Ville), however often one looks and whatever shape the losses have. What is
assumed: that the observations are independent draws from what the mean is of. So all documents about one text are one
observation, in a random order.

Observations of unequal size have a weight: `losses` is then [n, 2], the loss times the weight and the weight, with
weights in (0, 1]; the mean is the weighted one.

Paper: arXiv:2010.09686 (estimating means of bounded random variables by betting), with a mixture over fixed stakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log, log1p

import numpy as np

SHARES = np.array([1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.999])  # of the largest stake that is safe
Losses = Sequence[float] | np.ndarray


def weighted(losses: Losses) -> np.ndarray:
    """[n, 2] loss times weight, weight."""
    array = np.asarray(losses, dtype=float)
    return np.stack([array, np.ones(len(array))], axis=1) if array.ndim == 1 else array


def mean(losses: Losses) -> float:
    """The weighted mean."""
    total = weighted(losses).sum(axis=0)
    return float(total[0] / total[1])


def evidence_within(losses: Losses, tolerance: float) -> float:
    """Log capital of the bet that the mean loss is below `tolerance`.

    Args:
        losses: [n] in [-1, 1], or [n, 2].
        tolerance: below 1.
    """
    loss, weight = weighted(losses).T
    stakes = SHARES / (1 - tolerance)
    return _log_mean_capital(1 + stakes[:, None] * (tolerance * weight - loss)[None, :])


def evidence_outside(losses: Losses, tolerance: float) -> float:
    """Log capital of the bet that the mean loss is above `tolerance`."""
    loss, weight = weighted(losses).T
    stakes = SHARES / (1 + tolerance)
    return _log_mean_capital(1 + stakes[:, None] * (loss - tolerance * weight)[None, :])


def _log_mean_capital(factors: np.ndarray) -> float:
    """[stakes, n] factors: capital is spread evenly over the stakes."""
    logs = np.log(factors).sum(axis=1)
    return float(np.logaddexp.reduce(logs) - log(len(logs)))


def upper_bound(losses: Losses, alpha: float) -> float:
    """The mean loss is at most this, with confidence 1 - alpha, at whatever number of observations one has stopped."""
    low, high = -1.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if evidence_within(losses, middle) >= -log(alpha) else (middle, high)
    return high


def fewest(tolerance: float, alpha: float, weight: float = 1.0) -> int:
    """Observations of this weight that it takes where the setting never loses anything: fewer can prove nothing."""
    n = max(1, ceil(log(alpha) / log1p(-tolerance)))
    while evidence_within(np.tile([0.0, weight], (n, 1)), tolerance) < -log(alpha):
        n += max(1, n // 50)
    return n


def needed(losses: Losses, tolerance: float, alpha: float) -> int | None:
    """Observations that would show the mean to be within, were the next ones like these; None: no number would.

    By the stake that has won most: its capital grows by the same factor again.
    """
    loss, weight = weighted(losses).T
    stakes = SHARES / (1 - tolerance)
    rate = float(np.log(1 + stakes[:, None] * (tolerance * weight - loss)[None, :]).mean(axis=1).max())
    return ceil((log(len(SHARES)) - log(alpha)) / rate) if rate > 0 else None

"""Is a setting's mean loss against the full cache within a tolerance? Decided over paired scores, with confidence.

A loss is score(full) - score(setting) on the same document, in [-1, 1]. For the claim "mean loss <= tolerance" we bet
against its opposite: capital 1 is multiplied, document by document, by 1 + stake * (tolerance - loss). Were the true
mean above the tolerance, every factor would be 1 or less on average, so that the capital would ever reach 1/alpha with
a probability of at most alpha (Ville), whatever the distribution and however often one looks. So looking after each
round costs nothing, and a dozen documents without a difference prove nothing, which a bootstrap would say they do.

Paper: arXiv:2010.09686 (estimating means of bounded random variables by betting), with a mixture over fixed stakes.

The search runs over candidates = budgets x variants; each is tested at (1 - confidence) / candidates (Bonferroni), so
that with the stated confidence no setting outside the tolerance is recommended, whatever the scores look like. That
score does not fall as the budget grows is used to skip budgets (bisection), not for the confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log, log1p
from typing import Generic, TypeVar

import numpy as np

Candidate = TypeVar("Candidate")
SHARES = np.array(
    [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.999]
)  # stakes, of the largest that cannot lose all

WITHIN, OUTSIDE, UNDECIDED, DROPPED = "within", "outside", "not shown", "halved away"


def evidence_within(losses: Sequence[float] | np.ndarray, tolerance: float) -> float:
    """Log capital of the bet that the mean loss is below `tolerance`.

    Args:
        losses: [n] in [-1, 1].
        tolerance: below 1.
    """
    stakes = SHARES / (1 - tolerance)
    return _log_mean_capital(1 + stakes[:, None] * (tolerance - np.asarray(losses, float)[None, :]))


def evidence_outside(losses: Sequence[float] | np.ndarray, tolerance: float) -> float:
    """Log capital of the bet that the mean loss is above `tolerance`."""
    stakes = SHARES / (1 + tolerance)
    return _log_mean_capital(1 + stakes[:, None] * (np.asarray(losses, float)[None, :] - tolerance))


def _log_mean_capital(factors: np.ndarray) -> float:
    """[stakes, n] factors: capital is spread evenly over the stakes."""
    logs = np.log(factors).sum(axis=1)
    return float(np.logaddexp.reduce(logs) - log(len(logs)))


def upper_bound(losses: Sequence[float] | np.ndarray, alpha: float) -> float:
    """The mean loss is at most this, with confidence 1 - alpha, at whatever number of documents one has stopped."""
    low, high = -1.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if evidence_within(losses, middle) >= -log(alpha) else (middle, high)
    return high


def fewest_documents(tolerance: float, alpha: float) -> int:
    """Documents that it takes where the setting never loses anything: fewer can prove nothing, whatever they show."""
    n = max(1, ceil(log(alpha) / log1p(-tolerance)))
    while evidence_within(np.zeros(n), tolerance) < -log(alpha):
        n += max(1, n // 50)
    return n


@dataclass
class Verdict(Generic[Candidate]):
    """What became of one candidate: how many documents it was given, and what they said."""

    candidate: Candidate
    documents: int
    mean_loss: float
    decision: str
    at_most: float


@dataclass
class Answer(Generic[Candidate]):
    """What a search found: the recommended candidate, None if there is none; every verdict in order."""

    best: Verdict[Candidate] | None
    verdicts: list[Verdict[Candidate]]
    alpha: float  # of each candidate's test


def looks(first: int, most: int) -> list[int]:
    """Documents seen at each look: doubled each time."""
    out = [min(first, most)]
    while out[-1] < most:
        out.append(min(2 * out[-1], most))
    return out


def search(
    budgets: Sequence[Sequence[Candidate]],
    losses: Callable[[Candidate, int], np.ndarray],
    documents: int,
    tolerance: float,
    confidence: float,
    first_look: int = 32,
) -> Answer[Candidate]:
    """The smallest budget with a variant within the tolerance, by bisection; successive halving among the variants.

    Args:
        budgets: variants of each budget, smallest budget first; the candidates.
        losses: (candidate, n) to the losses on the first n documents, the same documents for each candidate.
        documents: how many there are.
        tolerance: largest mean loss that counts as equal, in (0, 1).
        confidence: that the recommended candidate is within it, over everything that was tried.
    """
    alpha = (1 - confidence) / sum(map(len, budgets))
    rounds = looks(first_look, documents)
    verdicts: list[Verdict[Candidate]] = []
    best = None
    low, high = 0, len(budgets) - 1
    while low <= high:
        middle = (low + high) // 2
        found = _halving(budgets[middle], losses, rounds, tolerance, alpha)
        verdicts += found
        within = [v for v in found if v.decision == WITHIN]
        if within:
            best, high = min(within, key=lambda v: v.mean_loss), middle - 1
        else:
            low = middle + 1
    return Answer(best, verdicts, alpha)


def _halving(
    variants: Sequence[Candidate],
    losses: Callable[[Candidate, int], np.ndarray],
    rounds: Sequence[int],
    tolerance: float,
    alpha: float,
) -> list[Verdict[Candidate]]:
    """All variants on a few documents, the better half of them on twice as many, and so on, up to the first proof."""
    alive, done = list(range(len(variants))), []
    for documents in rounds:
        seen = {i: losses(variants[i], documents) for i in alive}
        verdicts = {i: _judge(variants[i], seen[i], tolerance, alpha) for i in alive}
        open_ = [i for i in alive if verdicts[i].decision == UNDECIDED]
        done += [verdicts[i] for i in alive if i not in open_]
        if any(v.decision == WITHIN for v in done) or not open_ or documents == rounds[-1]:
            return done + [verdicts[i] for i in open_]
        open_.sort(key=lambda i: verdicts[i].mean_loss)
        alive = open_[: ceil(len(open_) / 2)]
        for i in open_[len(alive) :]:
            verdicts[i].decision = DROPPED
            done.append(verdicts[i])
    return done


def _judge(candidate: Candidate, losses: np.ndarray, tolerance: float, alpha: float) -> Verdict[Candidate]:
    needed = -log(alpha)
    decision = UNDECIDED
    if evidence_within(losses, tolerance) >= needed:
        decision = WITHIN
    elif evidence_outside(losses, tolerance) >= needed:
        decision = OUTSIDE
    return Verdict(candidate, len(losses), float(np.mean(losses)), decision, upper_bound(losses, alpha))

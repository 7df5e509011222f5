"""The smallest budget whose mean loss against the full cache is within a tolerance, with confidence.

Losses are tested by betting (stats/betting.py): one observation is a text with all documents about it, drawn in a
random order, and looking after each round costs nothing. So a dozen texts without a difference prove nothing, which a
bootstrap would say they do.

The search runs over candidates = budgets x variants, once for each question that is answered from the same scores (each
task, and their mean). Each candidate of each question is tested at (1 - confidence) / (candidates x questions), so that
with the stated confidence all answers hold together: no recommended setting is outside the tolerance, whatever shape
the losses have. That score does not fall as the budget grows is used to skip budgets (bisection), not for the
confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Generic, TypeVar

import numpy as np

from kv_lm_eval.stats import betting

Candidate = TypeVar("Candidate")
WITHIN, OUTSIDE, UNDECIDED, DROPPED = "within", "outside", "not shown", "halved away"


@dataclass
class Verdict(Generic[Candidate]):
    """What became of one candidate: how many texts it was given, and what they said.

    needed: texts that would show it to be within, were the others like these; None: none would, or it is decided.
    """

    candidate: Candidate
    texts: int
    mean_loss: float
    decision: str
    at_most: float
    needed: int | None = None


@dataclass
class Answer(Generic[Candidate]):
    """What a search found: the recommended candidate, None if there is none; every verdict in order."""

    best: Verdict[Candidate] | None
    verdicts: list[Verdict[Candidate]]
    alpha: float  # of each candidate's test


def looks(first: int, most: int) -> list[int]:
    """Texts seen at each look: doubled each time."""
    out = [min(first, most)]
    while out[-1] < most:
        out.append(min(2 * out[-1], most))
    return out


def alpha_of(budgets: Sequence[Sequence[Candidate]], confidence: float, questions: int) -> float:
    """The chance of a false decision that each test may take, so that all of them together keep the confidence."""
    return (1 - confidence) / (sum(map(len, budgets)) * questions)


def search(
    budgets: Sequence[Sequence[Candidate]],
    losses: Callable[[Candidate, int], np.ndarray],
    texts: int,
    tolerance: float,
    confidence: float,
    first_look: int = 32,
    questions: int = 1,
) -> Answer[Candidate]:
    """The smallest budget with a variant within the tolerance, by bisection; successive halving among the variants.

    Args:
        budgets: variants of each budget, smallest budget first; the candidates.
        losses: (candidate, n) to the losses on the first n texts, the same for each candidate; [n] or [n, 2] as in
            stats/betting.py.
        texts: how many there are, in a random order.
        tolerance: largest mean loss that counts as equal, in (0, 1).
        confidence: that the recommended candidate is within it, over everything that was tried.
        questions: searches that share the confidence.
    """
    alpha = alpha_of(budgets, confidence, questions)
    rounds = looks(first_look, texts)
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
    """All variants on a few texts, the better half of them on twice as many, and so on, up to the first proof."""
    alive, done = list(range(len(variants))), []
    for texts in rounds:
        seen = {i: losses(variants[i], texts) for i in alive}
        verdicts = {i: _judge(variants[i], seen[i], tolerance, alpha) for i in alive}
        open_ = [i for i in alive if verdicts[i].decision == UNDECIDED]
        done += [verdicts[i] for i in alive if i not in open_]
        if any(v.decision == WITHIN for v in done) or not open_ or texts == rounds[-1]:
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
    if betting.evidence_within(losses, tolerance) >= needed:
        decision = WITHIN
    elif betting.evidence_outside(losses, tolerance) >= needed:
        decision = OUTSIDE
    more = betting.needed(losses, tolerance, alpha) if decision == UNDECIDED else None
    return Verdict(candidate, len(losses), betting.mean(losses), decision, betting.upper_bound(losses, alpha), more)

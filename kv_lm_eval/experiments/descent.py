"""The fewest bytes whose mean divergence from the full cache is within a tolerance, with confidence.

A divergence has no largest value, so that the bets of search.py do not apply; its upper limit (stats/limits.py) is made
for one look at all texts. Settings that differ in the budget alone are a family. A family is walked down from its most
bytes, and left at the first setting that is not shown to be within: then a setting beyond the tolerance is recommended
only if the first such one on the way passes its one test, so that no test pays for the others, whatever shape the
divergences have. Families, and the questions that are answered from the same runs, share the chance of an error.

A setting that the first texts show to be outside gets no more of them: stopping for want of hope recommends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from kv_lm_eval.experiments.search import OUTSIDE, UNDECIDED, WITHIN
from kv_lm_eval.stats import betting, limits

Candidate = TypeVar("Candidate")
Look = Callable[[Candidate, int], np.ndarray]  # a setting's losses on the first n texts, [n, 2] as in stats/betting.py
Limit = Callable[[np.ndarray, float], float]  # losses and alpha to the largest mean that they leave possible


@dataclass
class Step(Generic[Candidate]):
    """What became of one setting. needed: texts that would show it, were the others like these; None: none would."""

    candidate: Candidate
    texts: int
    mean: float
    at_most: float
    decision: str
    needed: int | None = None


@dataclass(frozen=True)
class Terms:
    """What is asked of every family: of how many texts, at which tolerance, with which chance of an error each."""

    texts: int
    tolerance: float
    alpha: float
    first_look: int = limits.FEWEST
    limit: Limit = limits.upper_limit


def descend(family: Sequence[Candidate], losses: Look[Candidate], terms: Terms) -> list[Step[Candidate]]:
    """Settings of a family, most bytes first, down to the first that is not within."""
    steps: list[Step[Candidate]] = []
    for candidate in family:
        steps.append(_judge(candidate, losses, terms))
        if steps[-1].decision != WITHIN:
            break
    return steps


def smallest(steps: Sequence[Step[Candidate]], bytes_of: Callable[[Candidate], float]) -> Step[Candidate] | None:
    """Of those within, the one with the fewest bytes."""
    return min((s for s in steps if s.decision == WITHIN), key=lambda s: (bytes_of(s.candidate), s.mean), default=None)


def _judge(candidate: Candidate, losses: Look[Candidate], terms: Terms) -> Step[Candidate]:
    for texts in sorted({min(terms.first_look, terms.texts), terms.texts}):
        seen = losses(candidate, texts)
        mean, at_most = betting.mean(seen), terms.limit(seen, terms.alpha)
        if limits.lower_limit(seen, terms.alpha) > terms.tolerance or not np.isfinite(mean):
            return Step(candidate, texts, mean, at_most, OUTSIDE)
    if at_most <= terms.tolerance:
        return Step(candidate, texts, mean, at_most, WITHIN)
    return Step(candidate, texts, mean, at_most, UNDECIDED, limits.needed(seen, at_most, terms.tolerance))

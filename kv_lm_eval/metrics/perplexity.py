"""Perplexities as sums over all tokens.

Never a mean of perplexities: each document brings (sum of log-probabilities in nats, count), and the quotient is taken
once, at the end. Where nothing was counted the answer is "N/A", which is neither a number nor zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

NOT_AVAILABLE = "N/A"
Pair = tuple[float, float]  # sum of log-probabilities (nats) or of hits, and what it is divided by


def count_words(text: str) -> int:
    """Words as lm-eval's wikitext counts them: pieces between runs of white space, empty ones at the ends included."""
    return len(re.split(r"\s+", text))


def total(items: Sequence[float]) -> float:
    """Sum over the documents."""
    return sum(items)


def ratio(items: Sequence[Pair]) -> float | str:
    """Sum of the first parts divided by the sum of the second ones."""
    count = sum(c for _, c in items)
    return math.fsum(s for s, _ in items) / count if count else NOT_AVAILABLE


def perplexity(items: Sequence[Pair]) -> float | str:
    """exp(-sum of log-probabilities / count)."""
    mean = ratio(items)
    if isinstance(mean, str):
        return mean
    return math.exp(-mean) if -mean < 700 else math.inf


def bits(items: Sequence[Pair]) -> float | str:
    """Bits per counted unit."""
    mean = ratio(items)
    return mean if isinstance(mean, str) else -mean / math.log(2)


def percent(difference: float | None) -> float | None:
    """A difference of mean nll in nats as the change of the perplexity in per cent."""
    return None if difference is None else 100 * math.expm1(difference)

"""Perplexities as sums over all tokens, and the difference of two runs with its error.

Never a mean of perplexities: each document brings (sum of log-probabilities in nats, count), and the quotient is taken
once, at the end. Where nothing was counted the answer is "N/A", which is neither a number nor zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

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


def blocks(values: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of stretches of `size` tokens; none crosses the end of a document, the last of each is shorter.

    NaN marks a token that is left out.
    """
    parts = [v[i : i + size] for v in values for i in range(0, len(v), size)]
    sums = np.array([np.nansum(p, dtype=np.float64) for p in parts])
    counts = np.array([np.isfinite(p).sum() for p in parts], dtype=np.float64)
    return sums[counts > 0], counts[counts > 0]


def block_bootstrap(
    values: Sequence[np.ndarray], size: int = 512, draws: int = 4000, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Mean over tokens with an interval that allows for neighbouring tokens being alike.

    Blocks of neighbouring tokens are drawn with replacement, so that what is shared within a block is not taken for
    evidence twice. Percentile interval.

    Args:
        values: one array of per-token values for each document. size: tokens of a block.

    Returns:
        mean, low, high, blocks; low and high are None with fewer than 8 blocks, whose interval would mean nothing.
    """
    sums, counts = blocks(values, size)
    if not len(sums):
        return {"mean": None, "low": None, "high": None, "blocks": 0}
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 8:
        return {"mean": mean, "low": None, "high": None, "blocks": len(sums)}
    picks = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"mean": mean, "low": float(low), "high": float(high), "blocks": len(sums)}


def percent(difference: float | None) -> float | None:
    """A difference of mean nll in nats as the change of the perplexity in per cent."""
    return None if difference is None else 100 * math.expm1(difference)

"""Paired comparison of two runs on the same documents: a bootstrap interval, and a test for "within noise".

Documents are drawn with replacement, the same ones for both runs, so what is hard for both cancels out. The interval
is the 2.5 to 97.5 % range of the difference over the draws. With few documents it is too narrow (four losses of thirty
and no gain already exclude 0), so a difference counts as outside noise only if a test that swaps the two runs' answers
document by document, at random, finds as large a difference in less than 5 % of the swaps.

Paper: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation (paired bootstrap); Fisher 1935
(randomization test). Deviations: both at once, see above; for a group, documents are drawn within each of its tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kv_lm_eval.reporting.load import is_number

SEED = 1234
LEVEL = 0.95
DRAWS = 10_000
MAX_NUMBERS = 20_000_000  # draws x documents; more documents need fewer draws, but never below MIN_DRAWS
MIN_DRAWS = 1_000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Aggregation:
    """How a task makes one number of its documents': finish(sum of values / sum of weights), rounded or not."""

    name: str
    weighted: bool  # a document's value is a pair (value, weight), as for perplexity; otherwise all weigh 1
    finish: Callable[[Array], Array]
    tolerance: float = 1e-6

    def table(self, values: Sequence[object]) -> Array | None:
        """Values as an array (documents, 2) of value and weight, None if this is not such a metric."""
        if self.weighted:
            pairs = [v for v in values if isinstance(v, (list, tuple)) and len(v) == 2 and all(map(is_number, v))]
            return np.array(pairs, dtype=float) if pairs and len(pairs) == len(values) else None
        if not values or not all(isinstance(v, bool) or is_number(v) for v in values):
            return None
        return np.stack([np.array(values, dtype=float), np.ones(len(values))], axis=1)

    def value(self, table: Array) -> float:
        """The one number."""
        total = table.sum(axis=0)
        return float(self.finish(total[0] / total[1]))


AGGREGATIONS = (
    Aggregation("mean", False, lambda x: x),
    Aggregation("percent", False, lambda x: 100 * x, tolerance=0.0051),  # LongBench rounds to two digits
    Aggregation("perplexity", False, lambda x: np.exp(-x)),
    Aggregation("weighted_mean", True, lambda x: x),
    Aggregation("weighted_perplexity", True, lambda x: np.exp(-x)),
    Aggregation("bits_per_byte", True, lambda x: -x / math.log(2)),
)


def aggregation_of(sides: Sequence[tuple[Sequence[object], float]]) -> Aggregation | None:
    """The aggregation that makes the reported number out of the documents' values; None if none of ours does.

    Args:
        sides: (values, reported number) of each run that is compared: where all documents of one score 0, it alone
            cannot tell a mean from a percentage.
    """
    return next((a for a in AGGREGATIONS if all(_makes(a, values, reported) for values, reported in sides)), None)


def _makes(aggregation: Aggregation, values: Sequence[object], reported: float) -> bool:
    table = aggregation.table(values)
    if table is None:
        return False
    with np.errstate(all="ignore"):
        found = aggregation.value(table)
    slack = aggregation.tolerance * (1 if aggregation.name == "percent" else max(1.0, abs(reported)))
    return bool(abs(found - reported) <= slack)


@dataclass(frozen=True)
class Pair:
    """Two runs of one task on the same documents, in the same order: arrays (documents, 2) as Aggregation.table."""

    ours: Array
    base: Array
    aggregation: Aggregation
    in_blocks: bool = False  # rows are blocks of tokens, not documents

    @property
    def difference(self) -> float:
        """Ours minus base."""
        return self.aggregation.value(self.ours) - self.aggregation.value(self.base)

    @property
    def changed(self) -> int:
        """Documents with another value."""
        return int((~np.isclose(self.ours, self.base, rtol=1e-9, atol=1e-12)).any(axis=1).sum())


@dataclass(frozen=True)
class Comparison:
    """A difference to the full cache.

    difference is ours minus the full cache's, None where the two may not be compared; low and high are the ends of the
    95 % interval; p is the share of random swaps with a difference as large; documents is how many were compared and
    changed how many of them have another value; reason says why there is no interval, where there is none.
    """

    difference: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    documents: int = 0
    changed: int = 0
    left_out: int = 0  # documents that one of the two runs lacks
    unit: str = "documents"  # what `documents` and `changed` count
    reason: str = ""

    @property
    def verdict(self) -> str:
        """outside noise, within noise, identical (on every document), too few documents to tell, or unknown."""
        if self.low is None or self.high is None or self.p is None:
            return "unknown"
        if not self.changed:
            return "identical"
        if 2 / 2**self.documents >= 1 - LEVEL:  # the smallest p that so few documents can have
            return "too few documents"
        return "within noise" if self.low <= 0 <= self.high or self.p >= 1 - LEVEL else "outside noise"


def compare(
    pairs: Sequence[Pair], weights: Sequence[float] = (1.0,), left_out: int = 0, unit: str = "documents"
) -> Comparison:
    """One task (one pair), or a group: the weighted sum of its tasks' differences.

    Args:
        pairs: one a task.
        weights: of the tasks; they sum to 1.
        left_out: documents that only one run has, to be told.
        unit: what a row of a pair stands for.
    """
    documents = sum(len(pair.ours) for pair in pairs)
    most = max(len(pair.ours) for pair in pairs)
    draws = max(MIN_DRAWS, min(DRAWS, MAX_NUMBERS // most))
    drawn, swapped = np.zeros(draws), np.zeros(draws)
    difference = 0.0
    for i, (pair, weight) in enumerate(zip(pairs, weights, strict=True)):
        generator = np.random.default_rng([SEED, i])  # the same draws for every method, so that they compare
        drawn += weight * _bootstrap(pair, draws, generator)
        swapped += weight * _swap(pair, draws, generator)
        difference += weight * pair.difference
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    as_large = np.abs(swapped) >= abs(difference) - 1e-9 * max(1.0, abs(difference))
    return Comparison(
        difference=difference,
        low=float(low),
        high=float(high),
        p=float((1 + as_large.sum()) / (1 + draws)),
        documents=documents,
        changed=sum(pair.changed for pair in pairs),
        left_out=left_out,
        unit=unit,
    )


def _bootstrap(pair: Pair, draws: int, generator: np.random.Generator) -> Array:
    n = len(pair.ours)
    out = np.empty(draws)
    for start, size in _chunks(draws, n):
        chosen = generator.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=size * n).reshape(size, n).astype(float)
        out[start : start + size] = _finished(pair, counts @ pair.ours, counts @ pair.base)
    return out


def _swap(pair: Pair, draws: int, generator: np.random.Generator) -> Array:
    n = len(pair.ours)
    out = np.empty(draws)
    total = pair.ours.sum(axis=0) + pair.base.sum(axis=0)
    for start, size in _chunks(draws, n):
        stays = generator.integers(0, 2, (size, n)).astype(float)
        ours = stays @ pair.ours + (1 - stays) @ pair.base
        out[start : start + size] = _finished(pair, ours, total - ours)
    return out


def _finished(pair: Pair, ours: Array, base: Array) -> Array:
    finish = pair.aggregation.finish
    return finish(ours[:, 0] / ours[:, 1]) - finish(base[:, 0] / base[:, 1])


def _chunks(draws: int, n: int) -> list[tuple[int, int]]:
    size = max(1, 2_000_000 // n)
    return [(start, min(size, draws - start)) for start in range(0, draws, size)]

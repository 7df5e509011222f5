"""Paired comparison of two runs on the same documents: a 95 % interval, and a test for "within noise".

What is drawn is a cluster: all documents about one text (stats/clusters.py). The interval is Student's t with the
jackknife's error, every cluster left out in turn, so that it holds for any way in which a task makes one number of its
documents' (stats/intervals.py). A difference counts as outside noise if the interval excludes 0 and if, besides, a test
that swaps the two runs' answers cluster by cluster, at random, finds a larger difference in less than 5 % of the swaps
(an equal one counts half): four losses of thirty and no gain are no evidence, whatever their spread says.

Paper: MacKinnon, Nielsen, Webb 2023 (cluster-robust inference); Fisher 1935 (randomization test); Lancaster 1961 (equal
outcomes count half). Deviations: both at once, see above; for a group, each task's own clusters are strata, unless its
tasks share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_lm_eval.stats import intervals
from kv_lm_eval.stats.intervals import FEWEST, LEVEL

SEED = 1234  # of the swaps
DRAWS = 10_000
MAX_NUMBERS = 20_000_000  # draws x clusters; more of them need fewer draws, but never below MIN_DRAWS
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
            pairs = [v for v in values if isinstance(v, (list, tuple)) and len(v) == 2 and all(map(_is_number, v))]
            return np.array(pairs, dtype=float) if pairs and len(pairs) == len(values) else None
        if not values or not all(isinstance(v, bool) or _is_number(v) for v in values):
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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Pair:
    """Two runs of one task on the same documents, in the same order: arrays (documents, 2) as Aggregation.table.

    Attributes:
        clusters: [documents] which documents belong together; the same number in another pair is the same cluster.
            None: each is one of its own.
        unit: what a row stands for.
    """

    ours: Array
    base: Array
    aggregation: Aggregation
    clusters: NDArray[Any] | None = None
    unit: str = "documents"

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
    95 % interval; p is the share of random swaps with a larger difference, equal ones counted half; documents is how
    many were compared, clusters how many texts they are about, and changed how many of them have another value; reason
    says why there is no interval, where there is none.
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
    clusters: int = 0

    @property
    def verdict(self) -> str:
        """outside noise, within noise, identical (on every document), too few documents to tell, or unknown."""
        if self.difference is None or not self.documents:
            return "unknown"
        if not self.changed:
            return "identical"
        if self.low is None or self.high is None or self.p is None or self.clusters < FEWEST:
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
    tasks = _by_cluster(pairs)
    difference = sum(weight * pair.difference for pair, weight in zip(pairs, weights, strict=True))
    low, high = _interval(tasks, weights, difference)
    return Comparison(
        difference=difference,
        low=low,
        high=high,
        p=_swap_test(tasks, weights, difference),
        documents=sum(len(pair.ours) for pair in pairs),
        changed=sum(pair.changed for pair in pairs),
        left_out=left_out,
        unit=unit,
        clusters=len(set().union(*(task.clusters.tolist() for task in tasks))),
    )


def standard_error(table: Array, aggregation: Aggregation, clusters: NDArray[Any]) -> float | None:
    """Of one run's number, its documents drawn cluster by cluster; None of a single cluster."""
    task = _by_cluster([Pair(table, table, aggregation, clusters)])[0]
    if len(task.clusters) < 2:
        return None
    left_out = aggregation.finish(_ratio(task.ours.sum(axis=0) - task.ours))
    return math.sqrt(intervals.jackknife(left_out, aggregation.value(task.ours)))


@dataclass(frozen=True)
class _Task:
    """A pair summed by cluster: clusters [C] (their numbers), ours and base [C, 2]."""

    clusters: NDArray[Any]
    ours: Array
    base: Array
    finish: Callable[[Array], Array]

    def differences(self, ours: Array, base: Array) -> Array:
        """From sums (..., 2) of values and weights of either run."""
        return self.finish(_ratio(ours)) - self.finish(_ratio(base))


def _ratio(sums: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def _by_cluster(pairs: Sequence[Pair]) -> list[_Task]:
    given = [int(pair.clusters.max()) for pair in pairs if pair.clusters is not None and len(pair.clusters)]
    fresh, out = 1 + max(given, default=-1), []
    for pair in pairs:
        own = np.arange(fresh, fresh + len(pair.ours)) if pair.clusters is None else pair.clusters
        fresh += len(own)
        names, of_row = np.unique(own, return_inverse=True)
        ours, base = np.zeros((len(names), 2)), np.zeros((len(names), 2))
        np.add.at(ours, of_row, pair.ours)
        np.add.at(base, of_row, pair.base)
        out.append(_Task(names, ours, base, pair.aggregation.finish))
    return out


def _interval(tasks: Sequence[_Task], weights: Sequence[float], difference: float) -> tuple[float | None, float | None]:
    """Ends of the interval; None where a task has one cluster alone, from which its spread cannot be told."""
    if min(len(task.clusters) for task in tasks) < 2:
        return None, None
    parts = []
    for stratum in _strata(tasks):
        names = np.unique(np.concatenate([tasks[i].clusters for i in stratum]))
        moved = np.zeros(len(names))  # of the difference, when a cluster is left out
        for i in stratum:
            task = tasks[i]
            left = task.differences(task.ours.sum(axis=0) - task.ours, task.base.sum(axis=0) - task.base)
            whole = task.differences(task.ours.sum(axis=0), task.base.sum(axis=0))
            moved[np.searchsorted(names, task.clusters)] += weights[i] * (left - whole)
        parts.append((intervals.jackknife(moved, 0.0), len(names) - 1))
    variance = sum(v for v, _ in parts)
    if not math.isfinite(variance):
        return None, None
    found = intervals.student(difference, variance, intervals.degrees(parts), 0)
    return found.low, found.high


def _strata(tasks: Sequence[_Task]) -> list[list[int]]:
    """Tasks that share clusters, together."""
    out: list[tuple[set[int], list[int]]] = []
    for i, task in enumerate(tasks):
        names, members = set(task.clusters.tolist()), [i]
        apart = []
        for theirs, others in out:
            if names & theirs:
                names, members = names | theirs, others + members
            else:
                apart.append((theirs, others))
        out = [*apart, (names, members)]
    return [members for _, members in out]


def _swap_test(tasks: Sequence[_Task], weights: Sequence[float], difference: float) -> float:
    """The share of random swaps of whole clusters between the runs that give a larger difference; equal ones half."""
    names = np.unique(np.concatenate([task.clusters for task in tasks]))
    places = [np.searchsorted(names, task.clusters) for task in tasks]
    draws = max(MIN_DRAWS, min(DRAWS, MAX_NUMBERS // len(names)))
    generator = np.random.default_rng(SEED)  # the same swaps for every method, so that they compare
    larger, slack = 0.0, 1e-9 * max(1.0, abs(difference))
    for size in _chunks(draws, len(names)):
        stays = generator.integers(0, 2, (size, len(names))).astype(float)
        found = np.zeros(size)
        for task, place, weight in zip(tasks, places, weights, strict=True):
            ours = stays[:, place] @ (task.ours - task.base) + task.base.sum(axis=0)
            found += weight * task.differences(ours, task.ours.sum(axis=0) + task.base.sum(axis=0) - ours)
        above = np.abs(found) - abs(difference)
        larger += float((above > slack).sum() + 0.5 * (np.abs(above) <= slack).sum())
    return (0.5 + larger) / (1 + draws)


def _chunks(draws: int, n: int) -> list[int]:
    size = max(1, 2_000_000 // n)
    return [min(size, draws - start) for start in range(0, draws, size)]

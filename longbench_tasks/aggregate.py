"""From scores of samples to the official numbers of datasets, and from those to the averages people print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from .specs import CATEGORIES, Spec

BUCKETS = ("0-4k", "4-8k", "8k+")
AVERAGES = {
    "en": "English average: mean of the 6 categories",
    "zh": "Chinese average: mean of the 6 categories",
    "mean16": "mean of the 16 English and code datasets, as KV-cache papers print",
}


def percent(scores: Iterable[float]) -> float:
    """100 x mean, rounded to 2. Added one by one: `sum` is more exact since Python 3.12, and official is not."""
    total, number = 0.0, 0
    for score in scores:
        total += score
        number += 1
    return round(100 * total / number, 2)


def bucket_of(length: int) -> str:
    """LongBench-E's bucket of a row with this `length` (words, or characters in Chinese, as in the data)."""
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


def by_length(scored: Iterable[tuple[float, int]]) -> dict[str, float]:
    """Pairs of score and length to LongBench-E's result; a bucket without samples is absent."""
    import numpy as np  # its pairwise mean and its rounding are the official ones here

    buckets: dict[str, list[float]] = {name: [] for name in BUCKETS}
    for score, length in scored:
        buckets[bucket_of(length)].append(score)
    return {name: float(round(100 * np.mean(scores), 2)) for name, scores in buckets.items() if scores}


def _one_bucket(name: str, scored: Sequence[tuple[float, int]]) -> float:
    return by_length(scored).get(name, float("nan"))


def bucket_aggregations() -> dict[str, Any]:
    """lm-eval's aggregation for each bucket, over samples' pairs of score and length; NaN for an empty one."""
    return {name: partial(_one_bucket, name) for name in BUCKETS}


def averages(scores: Mapping[str, float], specs: Mapping[str, Spec]) -> dict[str, Any]:
    """Category means and averages; those that lack a dataset are absent, and `missing` says which.

    Args:
        scores: official scores (0 to 100) by dataset.
        specs: the datasets that belong in an average.

    Returns:
        {"en": {"categories": {...}, "average": x}, "zh": likewise, "mean16": x, "missing": {average: [datasets]}}
    """
    result: dict[str, Any] = {}
    missing = {}
    for language in ("en", "zh"):
        asked = {d: s.category for d, s in specs.items() if s.language in (language, "code")}
        members = {c: [d for d, category in asked.items() if category == c] for c in CATEGORIES}
        means = {c: _mean([scores[d] for d in ds]) for c, ds in members.items() if all(d in scores for d in ds)}
        result[language] = {"categories": {c: round(m, 2) for c, m in means.items()}}
        lacking = [d for ds in members.values() for d in ds if d not in scores]
        if lacking:
            missing[language] = lacking
        else:
            result[language]["average"] = round(_mean(list(means.values())), 2)
    sixteen = [d for d, s in specs.items() if s.language in ("en", "code")]
    if lacking := [d for d in sixteen if d not in scores]:
        missing["mean16"] = lacking
    else:
        result["mean16"] = round(_mean([scores[d] for d in sixteen]), 2)
    return {**result, "missing": missing}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

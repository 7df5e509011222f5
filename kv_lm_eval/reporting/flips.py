"""Single documents whose score changes between two runs, and the count of them where a score is right or wrong."""

from __future__ import annotations

from dataclasses import dataclass

from kv_lm_eval.reporting import compare
from kv_lm_eval.reporting.answers import Sample
from kv_lm_eval.reporting.cells import Column, Row
from kv_lm_eval.reporting.run import is_number
from kv_lm_eval.stats import mcnemar


@dataclass(frozen=True)
class Flip:
    """One document in both runs."""

    a: Sample
    b: Sample
    change: float  # of the score, B minus A


@dataclass(frozen=True)
class Changes:
    """All that change, the largest changes first; `test` where every score is right or wrong."""

    changed: list[Flip]
    test: mcnemar.Flips | None


def of(a: Row, b: Row, column: Column) -> Changes | None:
    """A task's documents in both runs; None where a score is no single number, or no answers were logged."""
    ours, theirs, keys = compare.in_common(b, a, column)
    pairs = [(theirs[key], ours[key]) for key in keys]
    scores = [(x.metrics[column.metric], y.metrics[column.metric]) for x, y in pairs]
    if not pairs or not all(isinstance(s, bool) or is_number(s) for two in scores for s in two):
        return None
    changed = [Flip(x, y, float(v) - float(u)) for (x, y), (u, v) in zip(pairs, scores, strict=True) if u != v]
    changed.sort(key=lambda flip: (-abs(flip.change), flip.a.doc_id))
    if not all(s in (0, 1) for two in scores for s in two):
        return Changes(changed, None)
    return Changes(changed, mcnemar.flips([bool(u) for u, _ in scores], [bool(v) for _, v in scores]))

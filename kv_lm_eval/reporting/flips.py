"""Single documents whose score changes between two runs, and the count of them where a score is right or wrong."""

from __future__ import annotations

from dataclasses import dataclass

from kv_lm_eval.reporting import compare
from kv_lm_eval.reporting.answers import Sample
from kv_lm_eval.reporting.cells import Column, Row
from kv_lm_eval.reporting.run import is_number
from kv_lm_eval.stats import paired


@dataclass(frozen=True)
class Flip:
    """One document in both runs."""

    a: Sample
    b: Sample
    change: float  # of the score, B minus A


@dataclass(frozen=True)
class Flips:
    """All that change, the largest changes first; right_or_wrong: every score is 0 or 1."""

    changed: list[Flip]
    documents: int
    right_or_wrong: bool

    @property
    def a_alone(self) -> int:
        """Documents that A has right and B has wrong."""
        return sum(flip.change < 0 for flip in self.changed)

    @property
    def b_alone(self) -> int:
        """The other way round."""
        return sum(flip.change > 0 for flip in self.changed)

    @property
    def mcnemar(self) -> float | None:
        """p of McNemar's exact test, None for scores between right and wrong."""
        return paired.mcnemar(self.b_alone, self.a_alone) if self.right_or_wrong else None


def of(a: Row, b: Row, column: Column) -> Flips | None:
    """A task's documents in both runs; None where a score is no single number, or no answers were logged."""
    ours, theirs, keys = compare.in_common(b, a, column)
    pairs = [(theirs[key], ours[key]) for key in keys]
    scores = [(x.metrics[column.metric], y.metrics[column.metric]) for x, y in pairs]
    if not pairs or not all(isinstance(s, bool) or is_number(s) for two in scores for s in two):
        return None
    changed = [Flip(x, y, float(v) - float(u)) for (x, y), (u, v) in zip(pairs, scores, strict=True) if u != v]
    changed.sort(key=lambda flip: (-abs(flip.change), flip.a.doc_id))
    return Flips(changed, len(pairs), all(s in (0, 1) for two in scores for s in two))

"""Retrieve.KV: the value is one of the words of an answer.

Reference: OpenBMB/InfiniteBench, src/compute_scores.py get_score_one_kv_retrieval.
Deviations: the value is the first of a list (there a list is looked for among words, so that nothing is ever right).
"""

from __future__ import annotations

from collections.abc import Sequence

_BETWEEN = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """1 where it is; punctuation other than hyphens separates words."""
    return float(reference in prediction.translate(_BETWEEN).split())

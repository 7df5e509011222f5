"""En.Dia: an answer holds one of the names, case ignored.

Reference: OpenBMB/InfiniteBench, src/compute_scores.py get_score_one_longdialogue_qa_eng. Deviations: none.
"""

from __future__ import annotations

from collections.abc import Sequence


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """1 where it does, within a word too."""
    return float(reference.upper() in prediction.strip().upper())

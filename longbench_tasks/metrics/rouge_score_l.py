"""EXTRA, not the official score: ROUGE-L of Google's package `rouge-score`, without stemming.

It splits on everything but [a-z0-9], so that Chinese text has no tokens; rouge_score_l_zh.py is for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns the F-measure of rougeL."""
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)

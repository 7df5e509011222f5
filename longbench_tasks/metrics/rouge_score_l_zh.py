"""EXTRA, not the official score: ROUGE-L of Google's package `rouge-score` over jieba's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from . import _jieba


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns the F-measure of rougeL."""
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    class Jieba:
        def tokenize(self, text: str) -> list[str]:
            return [token for token in _jieba.cut(text) if token.strip()]

    return RougeScorer(["rougeL"], tokenizer=Jieba())

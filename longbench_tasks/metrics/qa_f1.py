"""F1 over the words of two short answers, without case, ASCII punctuation and English articles.

Reference: THUDM/LongBench@2e00731, metrics.py qa_f1_score. Deviations: none.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns the F1. Deleting punctuation joins words ("well-known" is one), and quotes beyond ASCII stay."""
    return f1(_words(prediction), _words(reference))


def f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two multisets of tokens, 0 if they share none."""
    common = sum((Counter(prediction) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision = common / len(prediction)
    recall = common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()

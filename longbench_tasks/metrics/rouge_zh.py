"""ROUGE-L (rouge.py) over jieba's tokens of a Chinese text.

Only "." ends a sentence, not the Chinese full stop. Reference: THUDM/LongBench@2e00731, metrics.py rouge_zh_score.
Deviations: none.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import _jieba
from .rouge import rouge_l

MAX_TRACE_CALLS = 990  # one less than in English: the official function is called one frame deeper


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns F of the texts with a space between tokens."""
    return rouge_l(" ".join(_jieba.cut(prediction)), " ".join(_jieba.cut(reference)), MAX_TRACE_CALLS)

"""Code.Debug: an answer names the function with the error, by letter or by name.

Reference: OpenBMB/InfiniteBench, src/compute_scores.py get_score_one_code_debug. Deviations: none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NEEDS_CLASSES = True  # the four options
LETTERS = "ABCD"
_LAST = re.compile(r"\b[A-J]\b(?!.*\b[A-J]\b)")  # of the first line that has one
_BETWEEN = re.compile(r"[\n`'\"\-*]|[Oo]ption")
_BEFORE = ("answer is:", "is:", "answer:", "correct option is:")


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """1 where it does.

    Args:
        reference: the function. all_classes: the four options.
    """
    right = (LETTERS[list(all_classes or ()).index(reference)], reference)
    return float(_names(prediction.strip(), right))


def _names(answer: str, right: tuple[str, str]) -> bool:
    last = _LAST.search(answer)
    if last is not None and last[0] == right[0]:
        return True
    words = re.sub(" {2,}", " ", _BETWEEN.sub(" ", answer))
    if words.startswith(right):
        return True
    for before in _BEFORE:
        if (at := words.find(before)) >= 0:
            return words[at + len(before) + 1 :].startswith(right)
    return False

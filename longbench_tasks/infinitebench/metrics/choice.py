"""En.MC: an answer names the right one of four options.

Reference: OpenBMB/InfiniteBench, src/compute_scores.py get_score_one_longbook_choice_eng.
Deviations: none. A letter that stands alone counts first, and where it is wrong and the answer does not begin with one,
the answer is looked at again, in ways that may find another letter right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NEEDS_CLASSES = True  # the four options
LETTERS = "ABCD"
_LAST = re.compile(r"\b[A-D]\b(?!.*\b[A-D]\b)")  # of the first line that has one
_BETWEEN = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))
_BEFORE = ("answer is:", "answer:", "answer is", "option is")


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """1 where it does, by letter or in full.

    Args:
        reference: the right option. all_classes: the four.
    """
    right = (reference, LETTERS[list(all_classes or ()).index(reference)])
    return float(_names(prediction.strip(), right))


def _names(answer: str, right: tuple[str, str]) -> bool:
    last = _LAST.search(answer)
    if last is not None and last[0] in right:
        return True
    if not answer:
        return False
    if answer[0] in LETTERS:
        return answer[0] in right
    if answer in right:
        return True
    words = re.sub(" {2,}", " ", answer.translate(_BETWEEN))
    for before in _BEFORE:
        if (at := words.find(before)) >= 0:
            return words[at + len(before) + 1 :].startswith(right)
    first = next((word for word in words.split() if word in LETTERS), None)
    return first in right

"""Similarity of the first line of code with the reference, in whole percent, by the standard library's difflib.

The official script calls fuzzywuzzy, whose result depends on whether python-Levenshtein happens to be installed: with
it, lcc and repobench-p are 1 to 3 points higher. The official requirements do not have it; neither have we, whatever
is installed. The other variant is code_sim_levenshtein.py.

Reference: THUDM/LongBench@2e00731, metrics.py code_sim_score; fuzzywuzzy 0.18.0. Deviations: none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns a multiple of 0.01."""
    return similarity(prediction, reference, lambda line, wanted: SequenceMatcher(None, line, wanted).ratio())


def similarity(prediction: str, reference: str, ratio: Callable[[str, str], float]) -> float:
    """The first line of code against the reference, in whole percent of a ratio of two different texts."""
    line = first_line_of_code(prediction)
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * ratio(line, reference)) / 100


def first_line_of_code(prediction: str) -> str:
    """The first line without a back quote, "#" or "//": its indentation stays, and a blank line is one too."""
    for line in prediction.lstrip("\n").split("\n"):
        if "`" not in line and "#" not in line and "//" not in line:
            return line
    return ""

"""EXTRA, not the official score: code_sim.py as fuzzywuzzy computes it where python-Levenshtein is installed.

For comparison with results of KVCache-Factory, whose requirements install it. The ratio is 2 LCS / (sum of lengths).
Reference: fuzzywuzzy 0.18.0 StringMatcher; python-Levenshtein `ratio`. Deviations: none known.
"""

from __future__ import annotations

from collections.abc import Sequence

from .code_sim import similarity


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns a multiple of 0.01."""
    return similarity(prediction, reference, lambda a, b: 2 * lcs_length(a, b) / (len(a) + len(b)))


def lcs_length(a: str, b: str) -> int:
    """Length of the longest common subsequence of two strings."""
    places: dict[str, int] = {}
    for place, char in enumerate(a):
        places[char] = places.get(char, 0) | (1 << place)
    full = (1 << len(a)) - 1
    row = full
    for char in b:
        match = row & places.get(char, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()

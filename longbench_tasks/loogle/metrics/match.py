"""Cloze: masked names that an answer gives, exactly and with a word in common, of all that were asked for.

Reference: bigai-nlco/LooGLE, Evaluation/automatic_metrics.py get_exact_match, get_partial_match; automatic_eval.py
get_match_score.
Deviations: an answer is read as a literal (there it is run as Python); one that gives something else than a text for a
name has no partial match (there the script ends).
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterable
from typing import Any

NAMES = ("exact_match", "partial_match")
Matched = tuple[int, int]  # how many, and of how many


def score(prediction: str, reference: str) -> dict[str, Matched]:
    """Names that are right.

    Args:
        reference: JSON of the masked names.
    """
    wanted, given = json.loads(reference), _names(prediction)
    exact = sum(key in given and given[key] == name for key, name in wanted.items())
    try:
        partial = sum(bool({*name.split()} & {*given[key].split()}) for key, name in wanted.items() if key in given)
    except AttributeError:
        partial = 0
    return {"exact_match": (exact, len(wanted)), "partial_match": (partial, len(wanted))}


def percent(values: Iterable[Matched]) -> float:
    """Aggregation: over all names, rounded as officially."""
    right, asked = map(sum, zip(*values, strict=True))
    return 100 * round(right / asked, 4)


def _names(prediction: str) -> dict[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's, on the backslashes of an answer
            given = ast.literal_eval(prediction or "None")
    except Exception:  # a model's text may be anything
        return {}
    return given if isinstance(given, dict) else {}

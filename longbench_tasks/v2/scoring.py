"""The choice that an answer names, and LongBench v2's numbers.

Reference: THUDM/LongBench@c5ea10b, pred.py extract_answer and result.py. Deviations: none; a bucket without questions
is absent (there: a division by zero).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

PATTERNS = (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])")
BUCKETS = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long")}


def choice(answer: str) -> str | None:
    """The letter that an answer gives in the form that was asked for, None for any other answer."""
    plain = answer.strip().replace("*", "")
    return next((match[1] for pattern in PATTERNS if (match := re.search(pattern, plain))), None)


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """1 where the choice is the right one."""
    return float(choice(prediction) == reference)


def bucket_of(row: Mapping[str, str], kind: str) -> str:
    """A row's bucket of difficulty or length; what is not named otherwise counts as the last one."""
    names = BUCKETS[kind]
    return row[kind] if row[kind] in names else names[-1]


def of_bucket(name: str, scored: Iterable[tuple[float, Sequence[str]]]) -> float:
    """Aggregation: per cent of the answers of a bucket, NaN where there is none."""
    own = [value for value, buckets in scored if name in buckets]
    return 100 * sum(own) / len(own) if own else float("nan")

"""Math.Find: the first number of an answer is the one asked for.

Reference: OpenBMB/InfiniteBench, src/compute_scores.py get_score_one_math_find.
Deviations: a fraction where a whole number was asked for is wrong (there the script ends with a ValueError).
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """1 where it is, as whole numbers or as floats, as the reference is written; an answer's sign is not looked at."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return 0.0
    if not re.fullmatch(r"-?\d+", reference):
        return float(float(found[0]) == float(reference))
    return float("." not in found[0] and int(found[0]) == int(reference))

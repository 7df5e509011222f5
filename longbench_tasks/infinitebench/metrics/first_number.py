"""Retrieve.PassKey and Retrieve.Number: the first digits of an answer are the key.

Reference: OpenBMB/InfiniteBench, src/compute_scores.py get_score_one_passkey, get_score_one_number_string.
Deviations: none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """1 where they are the same digits; ASCII digits only, and "-7" has the digits 7."""
    found = re.search("[0-9]+", prediction)
    return float((found[0] if found else "") == reference)

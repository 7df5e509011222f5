"""The share of the right paragraph's number among all numbers in the prediction.

Reference: THUDM/LongBench@2e00731, metrics.py retrieval_score. Deviations: none; a reference that names no paragraph
raises IndexError as there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .count import share


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns the share of N, for the reference "Paragraph N"; any number counts, whatever stands before it."""
    return share(prediction, re.findall(r"Paragraph (\d+)", reference)[0])

r"""The share of right numbers among all numbers in the prediction.

Reference: THUDM/LongBench@2e00731, metrics.py count_score. Deviations: none; digits of other scripts match `\d` but
are never equal to the reference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns (numbers equal to the reference) / (numbers), compared as strings; 0 without any number."""
    return share(prediction, str(reference))


def share(prediction: str, number: str) -> float:
    """The share of `number` among the numbers in the text."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0

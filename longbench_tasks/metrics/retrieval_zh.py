"""retrieval.py for the references of passage_retrieval_zh.

Reference: THUDM/LongBench@2e00731, metrics.py retrieval_zh_score. Deviations: none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .count import share


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns the share of N among all numbers, for the reference "段落N"."""
    return share(prediction, re.findall(r"段落(\d+)", reference)[0])

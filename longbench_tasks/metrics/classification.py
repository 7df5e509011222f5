"""The share of the right class among all classes that the prediction names.

Reference: THUDM/LongBench@2e00731, metrics.py classification_score. Deviations: none, its quirk is kept: names that
are part of the right one are removed from the list while it is walked, so that of two in a row the second stays. The
class lists of trec and lsht hold no name within another.
"""

from __future__ import annotations

from collections.abc import Sequence

NEEDS_CLASSES = True


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns 1 / (number of classes named), 0 if the right one is not among them."""
    named = [name for name in all_classes or () if name in prediction]
    for name in named:
        if name in reference and name != reference:
            named.remove(name)
    return 1.0 / len(named) if reference in named else 0.0

"""Right and wrong answers of two runs on the same documents: who flipped, and whether that is more than chance.

Paper: McNemar 1947; here the exact test, two-sided: were both runs as good, each flip would be a fair coin. Deviations:
none. Documents about one text are not independent; where there are such, `paired.compare` is the honest test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Flips:
    """Documents by what became of their answers, and the test's p."""

    documents: int
    right_to_wrong: int
    wrong_to_right: int
    p: float


def flips(base: Sequence[bool], ours: Sequence[bool]) -> Flips:
    """From the base's to ours, document by document."""
    lost = sum(b and not o for b, o in zip(base, ours, strict=True))
    won = sum(o and not b for b, o in zip(base, ours, strict=True))
    return Flips(len(base), lost, won, _p(lost, won))


def _p(lost: int, won: int) -> float:
    n, fewer = lost + won, min(lost, won)
    below = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * below / 2**n)

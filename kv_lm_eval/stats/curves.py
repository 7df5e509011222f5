"""A number per token against the token's place: how a divergence grows with the distance from an eviction, say.

Places are gathered by doubling: 0, 1, 2 to 3, 4 to 7, ..., so that the first tokens after an event are seen one by one
and far ones in numbers that make an interval.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from kv_lm_eval.stats import fidelity

LEFT_OUT = -1  # the place of a token that is not counted


def by_place(
    values: Sequence[np.ndarray], places: Sequence[np.ndarray], texts: Sequence[Hashable] | None = None
) -> list[dict[str, Any]]:
    """The mean over the tokens of each stretch of places, with its interval where there are enough of them.

    Args:
        values: one array a document. places: of the same tokens, whole numbers; those below 0 are left out.
        texts: see `blocks.interval`.

    Returns:
        from, to (the last place, included), tokens, mean, low, high of each stretch that has tokens.
    """
    largest = max((int(p.max()) for p in places if len(p)), default=LEFT_OUT)
    edges = [0, *(2**k for k in range((largest + 1).bit_length() + 1))]
    out = []
    for start, stop in zip(edges, edges[1:], strict=False):
        inside = [(p >= start) & (p < stop) for p in places]
        tokens = int(sum(i.sum() for i in inside))
        if tokens:
            found = fidelity.interval([np.where(i, v, np.nan) for v, i in zip(values, inside, strict=True)], texts)
            numbers = {name: found[name] for name in ("mean", "low", "high")}
            out.append({"from": start, "to": min(stop - 1, largest), "tokens": tokens, **numbers})
    return out


def since_first(tokens: int, cuts: Sequence[int]) -> np.ndarray:
    """[tokens] how many tokens after the first cut each one comes; LEFT_OUT before it.

    Args:
        cuts: tokens fed before each cut, in order.
    """
    place = np.arange(tokens)
    return np.where(place >= cuts[0], place - cuts[0], LEFT_OUT) if cuts else np.full(tokens, LEFT_OUT)


def since_last(tokens: int, cuts: Sequence[int]) -> np.ndarray:
    """[tokens] how many tokens after the latest cut each one comes; LEFT_OUT before the first."""
    place = np.arange(tokens)
    which = np.searchsorted(np.asarray(cuts, dtype=np.int64), place, side="right") - 1
    return np.where(which >= 0, place - np.asarray([*cuts, 0])[which], LEFT_OUT)

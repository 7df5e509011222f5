"""The mean over the tokens of long texts, with an interval: blocks of neighbouring tokens, or whole texts.

Neighbouring tokens are alike, blocks of them hardly are. With six texts or more a whole text is one observation, and
the interval speaks of texts like these. With fewer, blocks are, and it speaks of these texts only: what one text has
of its own cannot be told from one text.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from kv_lm_eval.stats import intervals
from kv_lm_eval.stats.intervals import LEVEL

AIM, LEAST = 16, 8  # blocks that are aimed at, at least; blocks below which an interval would mean nothing
SHORTEST = 32  # tokens of a block: shorter ones are too alike


def size_for(tokens: int) -> int:
    """Tokens of a block: the largest power of two of which there are 16, at least 32.

    So a passage that is hard as a whole stays in one block wherever the text is long enough to have 16 of them.
    """
    return max(SHORTEST, 2 ** int(np.log2(max(tokens // AIM, 1))))


def cut(values: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of stretches of about `size` tokens, alike in length; none crosses the end of a document.

    NaN marks a token that is left out.
    """
    parts = [p for v in values if len(v) for p in np.array_split(v, max(1, round(len(v) / size)))]
    sums = np.array([np.nansum(p, dtype=np.float64) for p in parts])
    counts = np.array([np.isfinite(p).sum() for p in parts], dtype=np.float64)
    return sums[counts > 0], counts[counts > 0]


def interval(
    values: Sequence[np.ndarray],
    size: int | None = None,
    level: float = LEVEL,
    texts: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Mean over tokens with its interval.

    Args:
        values: one array of per-token values for each document. size: tokens of a block; None: from the length.
        texts: which text each document is a part of; None: each is one of its own.

    Returns:
        mean, low, high, unit ("texts" or "blocks"), units (how many), block_tokens (None for texts), reason; low and
        high are None where there are too few, and reason says so.
    """
    held = [(v, t) for v, t in zip(values, texts or range(len(values)), strict=True) if np.isfinite(v).any()]
    tokens = int(sum(np.isfinite(v).sum() for v, _ in held))
    if not tokens:
        out = dict.fromkeys(("mean", "low", "high", "block_tokens"))
        return {**out, "unit": "blocks", "units": 0, "reason": "no token was scored"}
    names = list(dict.fromkeys(t for _, t in held))
    by_text = [[v for v, t in held if t == name] for name in names] if texts else [[v] for v, _ in held]
    if len(by_text) >= intervals.FEWEST:
        size, unit, least = None, "texts", intervals.FEWEST
        sums = np.array([sum(np.nansum(v, dtype=np.float64) for v in part) for part in by_text])
        counts = np.array([sum(np.isfinite(v).sum() for v in part) for part in by_text], dtype=np.float64)
    else:
        size, unit, least = size or size_for(tokens), "blocks", LEAST
        sums, counts = cut([v for v, _ in held], size)
    found = intervals.of_ratio(sums, counts, level)
    few = found.count < least
    reason = f"{found.count} blocks of {size} tokens are too few for an interval, it takes {least}" if few else ""
    return {
        "mean": found.mean,
        "low": None if few else found.low,
        "high": None if few else found.high,
        "unit": unit,
        "units": found.count,
        "block_tokens": size,
        "reason": reason,
    }


def in_words(found: dict[str, Any]) -> str:
    """What the interval is over: "39 blocks of 512 tokens", "62 texts"."""
    of = f"blocks of {found['block_tokens']} tokens" if found["unit"] == "blocks" else "texts"
    return f"{found['units']} {of}"

"""One sample of a task to look at token by token: what came, how far apart the two caches were, and what each expected.

Of one document or answer a task, for the report's page; of all others nothing but numbers is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kv_lm_eval.metrics.divergence import Divergence
from kv_lm_eval.requests.run import Run

MOST_TOKENS = 320  # of a longer text, the stretch with the largest divergence
BEFORE = 4  # tokens with which one is decoded: what it looks like depends on them


def first_of_tasks(run: Run) -> set[int]:
    """The numbers of the requests that are shown, the first of each task."""
    first: dict[Any, int] = {}
    for i, request in enumerate(run.requests):
        first.setdefault(request.task_name, i)
    return set(first.values())


def view(
    found: Divergence, tokens: Sequence[int], before: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> dict[str, Any] | None:
    """Plain values of the stretch that is shown: its first token's number, and of each token its text, its KL (None: it
    is infinite), its probability under the full cache and under the method, and the likeliest five of both with theirs.

    Args:
        tokens: ids of all tokens. before: ids of what stands before them.
    """
    if found.top is None or not len(found):
        return None
    start = _worst(found.kl, MOST_TOKENS)
    rows = []
    for i in range(start, min(start + MOST_TOKENS, len(found))):
        context = [*before[-BEFORE:], *tokens[:i]][-BEFORE:]
        known = decode(context)

        def text(token: int, context: list[int] = context, known: str = known) -> str:
            return decode([*context, token])[len(known) :]

        both = [
            [[text(int(token)), round(float(p), 4)] for token, p in zip(ids, probs, strict=True)]
            for ids, probs in zip(found.top.ids[i], found.top.probs[i], strict=True)
        ]
        kl = float(f"{found.kl[i]:.4g}")
        row: dict[str, Any] = {"text": text(int(tokens[i]))}
        row |= {"kl": kl if math.isfinite(kl) else None, "top_base": both[0], "top": both[1]}
        for name, of in (("p_base", found.base_log_probs), ("p", found.log_probs)):
            row[name] = round(float(np.exp(of[i])), 4)
        rows.append(row)
    return {"start": start, "tokens": rows}


def _worst(kl: np.ndarray, most: int) -> int:
    """Where the stretch of so many tokens with the largest sum begins."""
    if len(kl) <= most:
        return 0
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(kl, posinf=100.0), dtype=np.float64)])
    return int(np.argmax(total[most:] - total[:-most]))

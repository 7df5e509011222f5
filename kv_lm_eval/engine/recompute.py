"""A bounded context without a cache: every token is predicted by a fresh forward over the tokens just before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kv_lm_eval.cache.transfer import sum_dtype
from kv_lm_eval.engine.choices import Score
from kv_lm_eval.engine.windows import Plain, Window, score_windows


def windows_of(tokens: Sequence[int], first: int, length: int) -> Iterator[Window]:
    """Windows that predict tokens[first:], each token from the `length` tokens before it.

    Tokens with no more than `length` before them share one window: there, a forward over all of them is the same.
    """
    shared = max(first, min(len(tokens), length + 1))
    if shared > first:
        yield Window(list(tokens[:first]), list(tokens[first:shared]), first)
    for t in range(shared, len(tokens)):
        yield Window(list(tokens[t - length : t]), [tokens[t]], t)


def score_recomputed(
    plain: Plain,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    length: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Score]:
    """Scores continuations token by token: (sum of log-probabilities in nats, whether greedy) for each.

    Args:
        contexts: at least one token each. length: tokens that each prediction sees.
    """
    owners, windows = [], []
    for i, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        for window in windows_of([*context, *continuation], len(context), length):
            owners.append(i)
            windows.append(window)
    sums, greedy = [0.0] * len(contexts), [True] * len(contexts)
    scored = score_windows(plain, windows, progress)
    for i, (log_probs, most_likely) in zip(owners, scored, strict=True):
        sums[i] += float(log_probs.to(sum_dtype(log_probs.device)).sum())
        greedy[i] = greedy[i] and bool(most_likely.all())
    return list(zip(sums, greedy, strict=True))

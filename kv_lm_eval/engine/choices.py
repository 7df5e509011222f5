"""Log-likelihoods of continuations over a compressed context: each distinct context is prefilled once.

Why not one forward over context and continuation, as lm-eval does: a cache compressed after the prefill would never
be read. Here the context is prefilled and compressed, its last `tail_tokens` are fed over the compressed cache, and
only then are the continuations scored, so that even a one-letter answer feels the compression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.prefill import Logits, NewCache, feed, feed_between_cuts, forward
from kv_lm_eval.engine.question import Tails, prefill_before_question_for_all
from kv_lm_eval.engine.together import prefill_for_all
from kv_lm_eval.methods.compression import compression_of

Score = tuple[float, bool]  # sum of log-probabilities in nats; whether greedy decoding would give the same tokens
Observe = Callable[[int, int, torch.Tensor], None]  # context, its continuation, logits [n, V] that predict its n tokens


def unobserved(context: int, continuation: int, logits: torch.Tensor) -> None:
    """Nobody looks at the logits [n, V]."""


class How(NamedTuple):
    """How continuations are scored.

    Attributes:
        dtype: of the softmax; None: that of the logits.
        observe: sees every continuation's logits [n, V], with the numbers of its context and its own.
    """

    dtype: torch.dtype | None = None
    observe: Observe = unobserved

    def only(self, continuation: int) -> How:
        """For a continuation that is scored as the only one of its context."""
        return self._replace(observe=lambda context, _, logits: self.observe(context, continuation, logits))


PLAINLY = How()


@torch.inference_mode()
def score_continuations(
    model: PreTrainedModel,
    new_cache: NewCache,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    tail_tokens: int | Sequence[int] | Tails,
    how: How = PLAINLY,
) -> tuple[list[list[Score]], CompressedCache]:
    """Scores the continuations of a batch of contexts.

    Args:
        contexts: token rows, each at least one token. continuations: for each context, one or more token rows.
        tail_tokens: last tokens of each context that are fed after the compression; one number for each context
            where they are its question (`question.py`), with the contexts of all questions if more will come.
        how: the softmax, and who sees every continuation's logits.

    Returns:
        scores in the order given, and the cache of the contexts (for its numbers).
    """
    ((scores, cache),) = score_for_all(model, [new_cache], contexts, continuations, tail_tokens, how)
    return scores, cache


@torch.inference_mode()
def score_for_all(
    model: PreTrainedModel,
    new_caches: Sequence[NewCache],
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    tail_tokens: int | Sequence[int] | Tails,
    how: How = PLAINLY,
) -> list[tuple[list[list[Score]], CompressedCache]]:
    """The same for several compressions, for which each context is prefilled once."""
    found: dict[int, tuple[list[list[Score]], CompressedCache]] = {}
    if isinstance(tail_tokens, int):
        for m, new_cache in enumerate(new_caches):
            if (scored := _score_uncut(model, new_cache, contexts, continuations, tail_tokens, how)) is not None:
                found[m] = scored
    rest = [m for m in range(len(new_caches)) if m not in found]
    for m, (cache, first) in zip(
        rest, _begun(model, [new_caches[m] for m in rest], contexts, tail_tokens), strict=True
    ):
        compression = compression_of(cache)
        forks = compression.schedule.online and compression.method.compresses or _beyond(cache, continuations)
        score = score_in_forks if forks else score_packed
        found[m] = score(model, cache, first, continuations, how), cache
    return [found[m] for m in range(len(new_caches))]


def _score_uncut(
    model: PreTrainedModel,
    new_cache: NewCache,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    tail_tokens: int,
    how: How,
) -> tuple[list[list[Score]], CompressedCache] | None:
    """lm-eval's own forward over context and continuation, where nothing is ever cut and no prefill would be shared or
    right; None elsewhere."""
    empty = new_cache()
    if compression_of(empty).lossy:
        return None
    longest = max(len(c) + max(map(len, group)) for c, group in zip(contexts, continuations, strict=True))
    if empty.facts.beyond(longest):
        return _score_each_alone(model, new_cache, contexts, continuations, tail_tokens, how)
    if all(len(group) == 1 for group in continuations):
        return _score_in_one_forward(model, new_cache, contexts, continuations, tail_tokens, how)
    return None


def _begun(
    model: PreTrainedModel,
    new_caches: Sequence[NewCache],
    contexts: Sequence[Sequence[int]],
    tail_tokens: int | Sequence[int] | Tails,
) -> list[tuple[CompressedCache, Logits]]:
    """For each compression the contexts, cut before their tail, and the logits after each last token, [1, V]."""
    if not new_caches:
        return []
    if not isinstance(tail_tokens, int):
        caches = prefill_before_question_for_all(model, new_caches, contexts, tail_tokens)
        return [(cache, feed(model, cache, [c[-1:] for c in contexts], keep=1)) for cache in caches]
    heads = [c[: max(0, len(c) - tail_tokens)] for c in contexts]
    tails = [c[len(h) :] for c, h in zip(contexts, heads, strict=True)]
    logits: Logits = {}
    if any(heads):
        caches, logits = prefill_for_all(model, new_caches, heads)
    else:  # contexts of tail_tokens or fewer have nothing to compress before their tail
        caches = [new_cache() for new_cache in new_caches]
    begun = []
    for cache in caches:
        cache.set(mode="decode")  # of contexts that are all tail, too
        begun.append((cache, _feed_tail(model, cache, tails, tail_tokens) if any(tails) else logits))
    return begun


def _feed_tail(model: PreTrainedModel, cache: CompressedCache, tails: Sequence[Sequence[int]], width: int) -> Logits:
    """The tail over the compressed cache, cut where the schedule says; logits after each row's last token, [1, V].

    A tail takes `width` ticks of the schedule's clock however short its context is.
    """
    cache.open(len(tails))
    cache.part([len(tail) for tail in tails])
    for segment, rows in zip(cache.segments, cache.members, strict=True):
        segment.decoded += width - len(tails[rows[0]])
    last: Logits = {}
    for _, logits in feed_between_cuts(model, cache, tails, keep=1):
        last |= logits
    return last


def _score_in_one_forward(
    model: PreTrainedModel,
    new_cache: NewCache,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    tail_tokens: int,
    how: How,
) -> tuple[list[list[Score]], CompressedCache]:
    """Nothing will ever be cut and no context is shared: lm-eval's own single forward.

    Logits are computed for as many tokens of each row as the longest continuation has.
    """
    cache = new_cache()
    rows = [list(c) + list(group[0])[:-1] for c, group in zip(contexts, continuations, strict=True)]
    logits = feed(model, cache, rows, keep=max(len(group[0]) for group in continuations))
    scores = []
    for b, group in enumerate(continuations):
        own = logits[b][-len(group[0]) :]
        how.observe(b, 0, own)
        scores.append([_score(own, group[0], how.dtype)])
    cache.count_only([max(0, len(c) - tail_tokens) for c in contexts], [len(c) for c in contexts])
    return scores, cache


def _beyond(cache: CompressedCache, continuations: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Whether the length of a context with a continuation turns all of its tokens."""
    lengths = (n + max(map(len, group)) for n, group in zip(cache.seen, continuations, strict=True))
    return any(map(cache.facts.beyond, lengths))


def _score_each_alone(
    model: PreTrainedModel,
    new_cache: NewCache,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    tail_tokens: int,
    how: How,
) -> tuple[list[list[Score]], CompressedCache]:
    """Nothing will ever be cut: every continuation of the one context in a forward of its own, as lm-eval does."""
    (context,), (group,) = contexts, continuations
    scores = []
    for i, continuation in enumerate(group):
        one, cache = _score_in_one_forward(model, new_cache, [context], [[continuation]], tail_tokens, how.only(i))
        scores.append(one[0][0])
    return [scores], cache


def score_packed(
    model: PreTrainedModel,
    cache: CompressedCache,
    first_logits: Logits,
    continuations: Sequence[Sequence[Sequence[int]]],
    how: How,
) -> list[list[Score]]:
    """All continuations of a context in one row; each sees the shared cache and itself. No copies, nothing stored."""
    rows = [[t for c in group for t in c[:-1]] for group in continuations]
    logits: Logits = {}
    if any(rows):
        fill = [most - len(row) for row, most in zip(rows, cache.widest(list(map(len, rows))), strict=True)]
        places = [
            [start + i for c in group for i in range(len(c) - 1)]
            for start, group in zip(cache.seen, continuations, strict=True)
        ]
        branches = [[i for i, c in enumerate(group) for _ in c[1:]] for group in continuations]
        cache.read_only([own + [-1] * n for own, n in zip(branches, fill, strict=True)])
        rows, places = ([own + [0] * n for own, n in zip(x, fill, strict=True)] for x in (rows, places))
        logits = forward(model, cache, rows, places=places)
        cache.set(mode="decode", branch=None)
    scores = []
    for b, group in enumerate(continuations):
        at, own = 0, []
        for i, c in enumerate(group):
            n = len(c) - 1
            part = first_logits[b]
            if n:
                part = torch.cat([part, logits[b][at : at + n]])
            at += n
            how.observe(b, i, part)
            own.append(_score(part, c, how.dtype))
        scores.append(own)
    return scores


def score_in_forks(
    model: PreTrainedModel,
    cache: CompressedCache,
    first_logits: Logits,
    continuations: Sequence[Sequence[Sequence[int]]],
    how: How,
) -> list[list[Score]]:
    """Cuts go on during the continuations: each on its own copy of the cache, in segments that end at the cuts."""
    if sum(map(len, continuations)) > 1 and _beyond(cache, continuations):
        (group,) = continuations  # a row beyond the border comes alone, and so do its continuations
        alone = (score_in_forks(model, cache, first_logits, [[c]], how.only(i)) for i, c in enumerate(group))
        return [[score for ((score,),) in alone]]
    owner = [b for b, group in enumerate(continuations) for _ in group]
    parts = [[first_logits[b]] for b in owner]
    rows = [list(c) for group in continuations for c in group]
    if any(len(row) > 1 for row in rows):
        for _, logits in feed_between_cuts(model, cache.select(owner), [row[:-1] for row in rows]):
            for i, own in logits.items():
                parts[i].append(own)
    scores: list[list[Score]] = [[] for _ in continuations]
    for b, part, row in zip(owner, parts, rows, strict=True):
        whole = torch.cat(part)
        how.observe(b, len(scores[b]), whole)
        scores[b].append(_score(whole, row, how.dtype))
    return scores


def _score(logits: torch.Tensor, continuation: Sequence[int], dtype: torch.dtype | None) -> Score:
    """Logits [n, V] that predict the n tokens of the continuation."""
    targets = torch.tensor(continuation, device=logits.device)
    log_probs = F.log_softmax(logits, dim=-1, dtype=dtype).gather(1, targets[:, None])
    return float(log_probs.sum()), bool((logits.argmax(-1) == targets).all())

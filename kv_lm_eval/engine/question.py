"""Query-agnostic compression: the context is prefilled and cut before the question is seen.

Each row is a head, the context, and a tail, everything from its question on. The heads are prefilled and cut. The
tails, but for their last token, are one forward over the compressed cache, in which nothing is cut: a question is read
whole. The schedule's clock starts with the last token, which every row has, so that a row does not depend on the
lengths of its neighbours' questions.

Many questions may be asked of one context: it is prefilled and cut once, and each of them goes on from a copy of what
is left of it, so that nothing of one answer is there for the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache, side_by_side
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.engine.prefill import NewCache, forward
from kv_lm_eval.engine.together import prefill_for_all

Head = tuple[int, ...]


class Contexts:
    """Compressed contexts of which more will be asked.

    Args:
        heads: the context of every question to come, in token ids; one is held from its first question to its last, so
            that questions of one context should follow each other.
        lasting: whether they are held for ever.
    """

    def __init__(self, heads: Iterable[Sequence[int]], lasting: bool = False) -> None:
        self._lasting = lasting
        self._left = Counter(map(tuple, heads))
        self._held: dict[Head, list[Segment]] = {}  # under each compression

    def forks(
        self, model: PreTrainedModel, new_caches: Sequence[NewCache], heads: Sequence[Sequence[int]]
    ) -> list[CompressedCache]:
        """Caches, each with a row for each head, cut after it; heads that are not held are prefilled, each once.

        Args:
            new_caches: the same at every call, or the first of them alone.
        """
        asked = [tuple(head) for head in heads]
        if new := [head for head in dict.fromkeys(asked) if head and head not in self._held]:
            prefilled, _ = prefill_for_all(model, new_caches, new)
            self._held |= {head: [_own(cache, row) for cache in prefilled] for row, head in enumerate(new)}
        caches = [new_cache() for new_cache in new_caches]
        for m, cache in enumerate(caches):
            cache.hold([self._held[head][m].select([0]) if head else None for head in asked])
        self._left.subtract(asked)
        alone = caches[0].facts.border is not None  # what is rotated next depends on what was rotated last
        self._held = {head: held for head, held in self._held.items() if self._is_left(head) and not alone}
        return caches

    def _is_left(self, head: Head) -> bool:
        return self._lasting or self._left[head] > 0


def _own(cache: CompressedCache, row: int) -> Segment:
    """A row as a segment of its own."""
    segment, at = cache.of_row(row)
    return segment if segment.rows == 1 else segment.select([at])


class Tails(NamedTuple):
    """Tokens of each row of a batch from its question on, at least 1, and the contexts of all questions."""

    tokens: Sequence[int]
    contexts: Contexts


@torch.no_grad()  # not inference_mode: generate() goes on with the cache outside of it
def prefill_before_question(
    model: PreTrainedModel, new_cache: NewCache, rows: Sequence[Sequence[int]], tails: Sequence[int] | Tails
) -> CompressedCache:
    """The cache of all tokens but the last of each row, cut after the heads.

    Args:
        rows: prompts, token ids. tails: tokens of each row from its question on, at least 1.
    """
    (cache,) = prefill_before_question_for_all(model, [new_cache], rows, tails)
    return cache


@torch.no_grad()
def prefill_before_question_for_all(
    model: PreTrainedModel,
    new_caches: Sequence[NewCache],
    rows: Sequence[Sequence[int]],
    tails: Sequence[int] | Tails,
) -> list[CompressedCache]:
    """The same for several compressions, for which a head is prefilled once."""
    tokens, contexts = tails if isinstance(tails, Tails) else (tails, None)
    heads, middles = split(rows, tokens)
    caches = (contexts or Contexts(heads)).forks(model, new_caches, heads)
    if any(middles):
        for cache in caches:
            whole = cache.compression.schedule.online or cache.compression.method.pages is not None
            cache.set(mode="hold" if whole else "decode")
        both = side_by_side(caches)
        forward(model, both, middles * len(caches), keep=1)
        caches = both.apart(len(caches))
    for cache in caches:
        cache.set(mode="decode", decoded=0)
    return caches


def split(rows: Sequence[Sequence[int]], tails: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Heads, and tails without their last token."""
    starts = [max(0, len(r) - n) for r, n in zip(rows, tails, strict=True)]
    heads = [list(r[:s]) for r, s in zip(rows, starts, strict=True)]
    return heads, [list(r[s:-1]) for r, s in zip(rows, starts, strict=True)]


def as_fed(rows: Sequence[Sequence[int]], tails: Sequence[int], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, N] with the columns of that cache, and one more for each row's last token.

    [padding, head][padding, tail][last token]: what generate() must be given to go on from there.
    """
    heads, middles = split(rows, tails)
    before, between = max(map(len, heads)), max(map(len, middles))
    ids, mask = [], []
    for row, head, middle in zip(rows, heads, middles, strict=True):
        left, inner = before - len(head), between - len(middle)
        ids.append([pad] * left + head + [pad] * inner + middle + [row[-1]])
        mask.append([0] * left + [1] * len(head) + [0] * inner + [1] * (len(middle) + 1))
    return torch.tensor(ids), torch.tensor(mask)

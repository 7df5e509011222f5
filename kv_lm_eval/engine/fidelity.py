"""A method and the full cache in step over the same tokens: how far apart their next-token distributions are.

The teacher (full cache) and the student (the method) run over one text, each in forwards of its own length, and every
block of logits is compared as soon as both are there. Nothing is stored but a few numbers a token; what is held are one
block of each, whose size streaming.py bounds. The teacher's numbers are those of a run with method=full.

Shapes: n tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.choices import How, Score, score_continuations
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.engine.prefill import Logits, NewCache, Rows
from kv_lm_eval.engine.question import Tails
from kv_lm_eval.engine.streaming import ScoredDocument, Stream, forwards, score_documents
from kv_lm_eval.metrics.divergence import Divergence, joined, of_logits

FLOOR_FORWARD = 37  # tokens of a forward of the noise floor's second run: no length that the first one has


def full_cache(facts: ModelFacts) -> NewCache:
    """Makes the teacher's caches."""
    return partial(make_cache, FULL, facts)


class Ahead:
    """A stream of logits that is read a little at a time: runs on when what is asked for has not come yet."""

    def __init__(self, forwards: Iterator[tuple[list[int], Logits]], rows: int) -> None:
        self._forwards = forwards
        self._held: list[list[tuple[int, torch.Tensor]]] = [[] for _ in range(rows)]

    def take(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Logits [n, V] that predict a row's tokens from `start` to `stop`; what stands before is let go of."""
        held = self._held[row]
        while not held or held[-1][0] + len(held[-1][1]) < stop:
            if held:  # the rest of a block, so that the block itself is not held beside the next one
                held[:] = [(max(at, start), x[max(0, start - at) :].clone()) for at, x in held if at + len(x) > start]
            fed, logits = next(self._forwards)
            for b, own in logits.items():
                self._held[b].append((fed[b], own))
        held[:] = [(at, logits) for at, logits in held if at + len(logits) > start]
        parts = [x[max(0, start - at) : stop - at] for at, x in held if at < stop]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _teacher(model: PreTrainedModel, facts: ModelFacts, rows: Rows) -> Ahead:
    return Ahead(forwards(model, full_cache(facts)(), rows), len(rows))


def score_beside(
    model: PreTrainedModel,
    new_cache: NewCache,
    documents: Sequence[Sequence[int]],
    stream: Stream,
    progress: Callable[[int], None] = lambda tokens: None,
    shown: Container[int] = (),
) -> tuple[list[ScoredDocument], CompressedCache, list[Divergence]]:
    """`streaming.score_documents` with the full cache beside it: also each document's numbers per token.

    Args:
        shown: documents of which the likeliest tokens are noted too.
    """
    teacher = _teacher(model, new_cache().facts, [[stream.prefix_token, *d][:-1] for d in documents])
    parts: list[list[Divergence]] = [[] for _ in documents]

    def observe(row: int, done: int, logits: torch.Tensor) -> None:
        stop = done + len(logits)
        base = teacher.take(row, done, stop)
        parts[row].append(of_logits(base, logits, torch.tensor(documents[row][done:stop]), row in shown))

    scored, cache = score_documents(model, new_cache, documents, stream, progress, observe)
    return scored, cache, list(map(joined, parts))


class Compared(NamedTuple):
    """How continuations are compared: the dtype of their scores' softmax (None: that of the logits), and those, by
    context and number, of which the likeliest tokens are noted too."""

    dtype: torch.dtype | None = None
    shown: Container[tuple[int, int]] = ()


PLAINLY = Compared()


def continue_beside(
    model: PreTrainedModel,
    new_cache: NewCache,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    tail_tokens: int | Sequence[int] | Tails,
    compared: Compared = PLAINLY,
) -> tuple[list[list[Score]], CompressedCache, list[list[Score]], list[list[Divergence]]]:
    """`choices.score_continuations` under the method and under the full cache: also the latter's scores, and the
    numbers per token of every continuation.

    An answer that was generated is a continuation too: its tokens under both caches, fed as decoding feeds them.
    """
    facts = new_cache().facts
    base: dict[tuple[int, int], torch.Tensor] = {}
    found: dict[tuple[int, int], Divergence] = {}

    def keep(b: int, i: int, logits: torch.Tensor) -> None:
        base[b, i] = logits

    def compare(b: int, i: int, logits: torch.Tensor) -> None:
        shown = (b, i) in compared.shown
        found[b, i] = of_logits(base.pop((b, i)), logits, torch.tensor(continuations[b][i]), shown)

    own = tail_tokens.tokens if isinstance(tail_tokens, Tails) else tail_tokens  # held contexts are the method's
    wanted, _ = score_continuations(model, full_cache(facts), contexts, continuations, own, How(compared.dtype, keep))
    scores, cache = score_continuations(
        model, new_cache, contexts, continuations, tail_tokens, How(compared.dtype, compare)
    )
    beside = [[found[b, i] for i in range(len(group))] for b, group in enumerate(continuations)]
    return scores, cache, wanted, beside


def share_kept(cache: CompressedCache, row: int, places: Sequence[int]) -> float:
    """The share of a row's tokens, by their places, whose pairs are held: the mean over KV heads and layers.

    Only layers that the method may cut count.
    """
    if not cache.compression.method.compresses:
        return 1.0
    segment, at = cache.of_row(row)
    wanted = torch.tensor(list(places))
    skipped = cache.compression.schedule.skip_layers
    stores = [segment.stores[layer] for layer in cache.facts.cut_layers if layer not in skipped]
    held = [torch.isin(wanted, head).float().mean() for store in stores for head in store.pos[at].cpu()]
    return float(torch.stack(held).mean()) if held else 1.0


def noise_floor(
    model: PreTrainedModel,
    facts: ModelFacts,
    prefix_token: int,
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype | None] = (None,),
) -> list[Divergence]:
    """The full cache against itself in shorter forwards: what a divergence is where nothing differs but rounding.

    Args:
        dtypes: in which the matrix products of further runs are computed (torch.autocast); None: the model's own.

    Returns:
        one for each of dtypes.
    """
    row = [prefix_token, *tokens][:-1]
    once = _teacher(model, facts, [row])
    others = [forwards(model, full_cache(facts)(), [row], most=FLOOR_FORWARD) for _ in dtypes]
    device = next(model.parameters()).device.type
    parts: list[list[Divergence]] = [[] for _ in dtypes]
    for done in range(0, len(tokens), FLOOR_FORWARD):
        stop = min(done + FLOOR_FORWARD, len(tokens))
        base, targets = once.take(0, done, stop), torch.tensor(tokens[done:stop])
        for found, other, dtype in zip(parts, others, dtypes, strict=True):
            with torch.autocast(device, dtype=dtype) if dtype else nullcontext():
                _, logits = next(other)
            found.append(of_logits(base, logits[0], targets))
    return list(map(joined, parts))

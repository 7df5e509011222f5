"""Log-likelihood of whole documents with one cache carried from the first token to the last.

No window starts afresh with a context of one token, and the numbers are those of feeding one token at a time, for every
method. Where the kept tokens follow from positions alone, a chunk of any length is one banded attention (`Band`).
Where a score decides, the document is fed in segments that end where the schedule cuts.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from kv_lm_eval.cache.band import Band
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.prefill import HOLD_TOKENS, Logits, NewCache, Rows, feed, feed_between_cuts
from kv_lm_eval.methods.compression import Compression, compression_of

LOGIT_ELEMENTS = 2**27  # logits held at a time
MIN_CHUNK = 64  # tokens in one forward, however large the vocabulary
Observe = Callable[[int, int, torch.Tensor], None]  # row, tokens before, logits [n, V] that predict the next n


@dataclasses.dataclass
class ScoredDocument:
    """One document of n tokens, token by token.

    Attributes:
        log_probs: [n] float32 (float64 of a model in float64), nats. greedy: [n] bool, whether the token was the most
            likely one.
        slots: [n] int32, slots per KV head that the query which predicted the token saw, itself included, in the layer
            that holds most; where all layers share their slots, or scores alone decide how many stay, as it was found.
        evictions: (tokens fed, slots dropped per KV head) of every cut, in order; the document's prefix token counts
            as fed.
    """

    log_probs: torch.Tensor
    greedy: torch.Tensor
    slots: torch.Tensor
    evictions: list[tuple[int, int]]


class Stream(NamedTuple):
    """How documents are read.

    Attributes:
        prefix_token: fed before each document, so that its first token is scored too.
        every: the schedule's compress_every for them, at least 1.
        prefill_tokens: so many tokens (prefix included) are one forward of full attention with one cut after it, and
            the stream starts there; 0: the stream starts with the first token.
        dtype: of the softmax; None: that of the logits.
    """

    prefix_token: int
    every: int
    prefill_tokens: int = 0
    dtype: torch.dtype | None = None


@torch.inference_mode()
def score_documents(
    model: PreTrainedModel,
    new_cache: NewCache,
    documents: Sequence[Sequence[int]],
    stream: Stream,
    progress: Callable[[int], None] = lambda tokens: None,
    observe: Observe = lambda row, done, logits: None,
) -> tuple[list[ScoredDocument], CompressedCache]:
    """Log-probability of every token of a batch of documents, each predicted from all that the cache still holds.

    Args:
        documents: token rows. progress: called with the number of tokens scored by each step.
        observe: sees every block of logits as it comes, each row's in order.

    Returns:
        one ScoredDocument each; and the cache (for its numbers).
    """
    rows = [[stream.prefix_token, *d][:-1] for d in documents]
    longest = max(map(len, rows))
    cache = _stream_cache(new_cache(), stream, longest)
    parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in rows]
    found = [Found(len(cache.facts.cut_layers)) for _ in rows] if compression_of(cache).open else None
    for fed, logits in forwards(model, cache, rows, stream.prefill_tokens):
        for b, own in logits.items():
            targets = torch.tensor(documents[b][fed[b] : fed[b] + len(own)], device=own.device)
            parts[b].append(_scored(own, targets, stream.dtype))
            observe(b, fed[b], own)
            if found is not None:
                found[b].note([cache.held[i][b] for i in cache.facts.cut_layers], len(own))
        progress(sum(map(len, logits.values())))
    scored = []
    for b, part in enumerate(parts):
        document = _document(part, len(documents[b]), stream.prefill_tokens, cache)
        if found is not None:
            slots = torch.tensor(found[b].slots, dtype=torch.int32)
            document = dataclasses.replace(document, slots=slots, evictions=found[b].cuts)
        scored.append(document)
    return scored, cache


@dataclasses.dataclass
class Found:
    """What a row held at every token, and its cuts, where they are not known before it is run.

    Attributes:
        slots: by token, ceil of what it saw in the layer that holds most. cuts: as in ScoredDocument.
    """

    layers: int
    slots: list[int] = dataclasses.field(default_factory=list)
    cuts: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    _held: list[float] = dataclasses.field(default_factory=list)

    def note(self, held: Sequence[float], tokens: int) -> None:
        """A forward of so many tokens, after which the layers hold so much."""
        before = self._held or [0.0] * self.layers
        self.slots += [ceil(max(before) + i) for i in range(1, tokens + 1)]
        dropped = max(b + tokens - h for b, h in zip(before, held, strict=True))
        if dropped > 0:
            self.cuts.append((len(self.slots), ceil(dropped)))
        self._held = list(held)


@torch.inference_mode()
def forwards(
    model: PreTrainedModel, cache: CompressedCache, rows: Rows, prefill_tokens: int = 0, most: int | None = None
) -> Iterator[tuple[list[int], Logits]]:
    """Tokens of each row fed before, and the logits of all that are fed, for each forward.

    Args:
        most: tokens of a row in one forward, at most; fewer where the logits of more would not fit. The first
            `prefill_tokens` are one.
    """
    vocab = model.config.get_text_config().vocab_size
    at, most = 0, min(most or HOLD_TOKENS, max(MIN_CHUNK, LOGIT_ELEMENTS // (len(rows) * vocab)))
    if prefill_tokens and not isinstance(cache.segments[0], Band):
        at = cache.facts.until_border(0, prefill_tokens)
        yield [0] * len(rows), feed(model, cache, [row[:at] for row in rows])
    cache.set(mode="decode")
    rest, facts = [row[at:] for row in rows], cache.facts
    for fed, logits in feed_between_cuts(model, cache, rest, limit=lambda n: facts.until_border(at + n, most)):
        yield [at + n for n in fed], logits


def _stream_cache(cache: CompressedCache, stream: Stream, tokens: int) -> CompressedCache:
    """The cache for documents of up to `tokens` tokens: the one given, or one that needs no segments."""
    schedule = dataclasses.replace(compression_of(cache).schedule, compress_every=stream.every)
    compression = dataclasses.replace(compression_of(cache), schedule=schedule)
    cache.set(compression=compression)
    cache.prefill_evicts = False  # a document's first tokens are read whole
    if not compression.method.compresses or not compression.banded or tokens < 1:
        return cache
    slots, cuts = visible_slots(compression, tokens, stream.prefill_tokens, [0])
    return CompressedCache(
        compression, cache.facts, partial(Band, slots=slots, cuts=dict(cuts), prefill_tokens=stream.prefill_tokens)
    )


def _scored(
    logits: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target [n] and whether it is the most likely token, from logits [n, V]."""
    log_probs = F.log_softmax(logits, dim=-1, dtype=dtype).gather(1, targets[:, None]).squeeze(1)
    return log_probs.to(torch.promote_types(log_probs.dtype, torch.float32)), logits.argmax(-1) == targets


def _document(
    parts: list[tuple[torch.Tensor, torch.Tensor]], n: int, prefill_tokens: int, cache: CompressedCache
) -> ScoredDocument:
    slots, evictions = visible_slots(compression_of(cache), n, prefill_tokens, cache.facts.cut_layers)
    log_probs = torch.cat([p for p, _ in parts]) if parts else torch.zeros(0)
    greedy = torch.cat([g for _, g in parts]) if parts else torch.zeros(0, dtype=torch.bool)
    return ScoredDocument(log_probs, greedy, slots, evictions)


def visible_slots(
    compression: Compression, tokens: int, prefill_tokens: int, layers: Sequence[int]
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """What a stream of T = `tokens` tokens will hold at each, [T], and its cuts, from integers alone: see
    ScoredDocument."""
    prompt = min(prefill_tokens, tokens)
    slots = torch.zeros(tokens, dtype=torch.int32)
    dropped: dict[int, int] = {}
    for layer in compression.distinct_layers(layers):
        held = array("i", range(1, prompt))
        for fed, (before, after) in enumerate(
            compression.trace(prompt, tokens - prompt, layer, layers), max(prompt, 1)
        ):
            held.append(ceil(before))
            if after < before:
                dropped[fed] = max(dropped.get(fed, 0), ceil(before - after))
        if held:
            slots = torch.maximum(slots, torch.frombuffer(held, dtype=torch.int32))
    return slots, sorted(dropped.items())

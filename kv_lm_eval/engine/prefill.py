"""Feeding token rows of any lengths to the model under one cache, prompts in chunks if the cache asks for it.

Rows that are fed alike are one rectangle. Others are packed: all tokens in one row [1, N], each with its own position,
and only attention (`CompressedCache.attend`) knows where one row ends and the next begins. Nothing is padded, so that a
row is computed as it would be alone.

A prompt in chunks (`CompressedCache.prefill_chunk`) bounds the activations, those of the MLP too, by the chunk instead
of the prompt. Chunks are counted from the prompt's end.
 - As it is, nothing is cut until the last chunk is in: the same numbers as one forward, for every method, and all keys
   and values of the prompt are held until then.
 - With `prefill_evicts` every chunk is followed by a cut: keys and values are bounded too, whatever the length, but
   later chunks do not see what was evicted. Another semantic, for methods that work online anyway.

Shapes: B rows, n tokens of a row, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine import again
from kv_lm_eval.engine.forward import device_of, logits_of
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.compression import compression_of
from kv_lm_eval.methods.schedule import Schedule

NewCache = Callable[[], CompressedCache]
Rows = Sequence[Sequence[int]]  # token ids; a row of none is not fed
Logits = dict[int, torch.Tensor]  # by row that was fed, [n, V]
HOLD_TOKENS = 4096  # longest stretch of a prompt in one forward when nothing forces a shorter one


def feed(model: PreTrainedModel, cache: CompressedCache, rows: Rows, keep: int = 0) -> Logits:
    """Feeds the given tokens: logits of the last `keep` of each row, 0: of all.

    One forward; a prompt (mode "prefill") takes one for each of the cache's chunks.
    """
    *earlier, last = chunks(cache, rows)
    if not earlier:
        return forward(model, cache, rows, keep)
    found: dict[int, list[torch.Tensor]] = defaultdict(list)
    for logits in [*_feed_earlier(model, cache, earlier, keep), forward(model, cache, last, keep)]:
        for row, own in logits.items():
            found[row].append(own)
    return {row: torch.cat(parts)[-keep:] for row, parts in found.items()}


def chunks(cache: CompressedCache, rows: Rows) -> list[Rows]:
    """The rows' tokens in the chunks that the cache asks for, the last one whole; what is no prompt is one chunk."""
    width, size = max(map(len, rows)), cache.prefill_chunk
    if size is None or cache.mode != "prefill" or cache.prefill_end is not None or width <= size:
        return [rows]
    if cache.facts.beyond(width):
        name, border = "prefill_evict" if cache.prefill_evicts else "prefill_chunk", cache.facts.border
        raise UserError(
            f"{name}={size} with a prompt of {width} tokens: beyond {border} tokens this model rotates every token by "
            "the length of the whole sequence, which a chunk does not know, so that chunks would give other answers; "
            f"leave {name} out, or take prompts of at most {border} tokens"
        )
    ends = range((width - 1) // size * size, -1, -size)  # tokens that come after each chunk
    return [[row[max(0, len(row) - end - size) : max(0, len(row) - end)] for row in rows] for end in ends]


def feed_beginning(model: PreTrainedModel, cache: CompressedCache, rows: Rows) -> None:
    """All chunks of prompts but the last, with which generate() goes on."""
    *earlier, _ = chunks(cache, rows)
    _feed_earlier(model, cache, earlier, 1)


@torch.no_grad()  # not inference_mode: generate() adds to these tensors outside of it
def _feed_earlier(model: PreTrainedModel, cache: CompressedCache, parts: Sequence[Rows], keep: int) -> list[Logits]:
    """Logits of the chunks before the last; the cache is left as the last chunk, the end of the prefill, needs it."""
    with _before_the_last(cache):
        return [forward(model, cache, part, keep) for part in parts]


@contextmanager
def _before_the_last(cache: CompressedCache) -> Iterator[None]:
    """Chunks that are stored only, or each cut to what the method keeps of the tokens so far."""
    compression = compression_of(cache)
    cache.set(mode="hold")
    if cache.prefill_evicts:
        every_chunk = Schedule(compress_every=1, skip_layers=compression.schedule.skip_layers)
        cache.set(mode="decode", compression=dataclasses.replace(compression, schedule=every_chunk))
    yield
    cache.set(mode="prefill", compression=compression, decoded=0)


def forward(
    model: PreTrainedModel, cache: CompressedCache, rows: Rows, keep: int = 0, places: Rows | None = None
) -> Logits:
    """One forward of the rows' tokens, and others of what the method wants to read again before its cut: logits of the
    last `keep` of each row, 0: of all.

    Args:
        places: position of each token; None: they follow on what the row has seen.
    """
    stores = not any(segment.reads_only for segment in cache.segments)
    logits = _forward(model, cache, rows, keep, places)
    if stores and compression_of(cache).method.reads_again:
        again.after_forward(cache, rows, lambda tokens: _forward(model, cache, tokens, 1, None))
    return logits


def _forward(model: PreTrainedModel, cache: CompressedCache, rows: Rows, keep: int, places: Rows | None) -> Logits:
    shares = cache.announce([len(row) for row in rows])
    fed, ids, positions = list[int](), list[int](), list[int]()
    for segment, members in shares:
        tokens = len(rows[members[0]])
        segment.prepare(tokens)
        for row, start in zip(members, segment.next_positions(), strict=True):
            fed.append(row)
            ids += rows[row]
            positions += range(start, start + tokens) if places is None else places[row]
    _mind_border(model, cache, len(fed), max(positions) + 1, min(positions))
    alike, device = len(shares) == 1, device_of(model)
    shape = (len(fed), -1) if alike else (1, -1)
    counts = [len(rows[row]) for row in fed]
    some = [min(keep, n) if keep else n for n in counts]
    ends = torch.tensor(counts).cumsum(0).tolist()
    wanted = some[0] if alike else torch.cat([torch.arange(e - n, e) for e, n in zip(ends, some, strict=True)])
    words = {"positions": torch.tensor(positions).view(shape), "cache": cache, "keep": wanted}
    logits = logits_of(model, torch.tensor(ids).view(shape).to(device), **words)  # type: ignore[arg-type]
    return dict(zip(fed, logits if alike else logits[0].split(some), strict=True))


def _mind_border(model: PreTrainedModel, cache: CompressedCache, rows: int, most: int, first: int) -> None:
    """Where a sequence's length turns all of its tokens: rows come alone, and a new one starts from the model's own
    frequencies."""
    if cache.facts.border is None:
        return
    assert rows == 1 or not cache.facts.beyond(most), "one row's length would rotate the others"
    if not first:
        assert cache.facts.rope is not None
        cache.facts.rope.forget(device_of(model))


def feed_between_cuts(
    model: PreTrainedModel,
    cache: CompressedCache,
    rows: Rows,
    keep: int = 0,
    limit: Callable[[int], int] = lambda fed: sys.maxsize,
) -> Iterator[tuple[list[int], Logits]]:
    """Feeds rows in forwards that end where the schedule cuts: for each, how many tokens of each row were fed before,
    and the logits of the last `keep` of each row, 0: of all.

    Args:
        limit: tokens of a row in one forward at most, after so many.
    """
    fed = [0] * len(rows)
    while any(left := [len(row) - n for row, n in zip(rows, fed, strict=True)]):
        steps = cache.until_due([min(n, limit(before)) for n, before in zip(left, fed, strict=True)])
        yield list(fed), feed(model, cache, [row[n : n + s] for row, n, s in zip(rows, fed, steps, strict=True)], keep)
        fed = [n + s for n, s in zip(fed, steps, strict=True)]


def prefill(model: PreTrainedModel, new_cache: NewCache, rows: Rows) -> tuple[CompressedCache, Logits]:
    """Prompts with a cut after the last token: the cache, and the last token's logits [1, V] of every row that has
    any."""
    cache = new_cache()
    return cache, feed(model, cache, rows, keep=1)

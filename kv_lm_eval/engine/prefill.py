"""Feeding token rows of any lengths to the model under one cache, prompts in chunks if the cache asks for it.

A prompt in chunks (`CompressedCache.prefill_chunk`) bounds the activations, those of the MLP too, by the chunk instead
of the prompt. Chunks are counted from the prompt's end, so that a row of a batch is cut up as it would be alone.
 - As it is, nothing is cut until the last chunk is in: the same numbers as one forward, for every method, and all keys
   and values of the prompt are held until then.
 - With `prefill_evicts` every chunk is followed by a cut: keys and values are bounded too, whatever the length, but
   later chunks do not see what was evicted. Another semantic, for methods that work online anyway.

Shapes: B rows, q tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.forward import device_of, logits_of
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.compression import compression_of
from kv_lm_eval.methods.schedule import Schedule

NewCache = Callable[[], CompressedCache]
HOLD_TOKENS = 4096  # longest stretch of a prompt in one forward when nothing forces a shorter one


def feed(
    model: PreTrainedModel,
    cache: CompressedCache,
    rows: Sequence[Sequence[int]],
    *,
    side: str,
    logits: int,
    starts: Sequence[int] | None = None,
) -> torch.Tensor:
    """Feeds the given tokens: logits of the last `logits` columns, [B, logits, V] (0: all columns).

    One forward; a prompt (mode "prefill") takes one for each of the cache's chunks.

    Args:
        rows: new tokens of each row; shorter rows are padded.
        side: where the padding goes. "left" before the tokens (prompts), "right" after them (rows that have ended).
        starts: position of each row's first token; default the number of tokens that the row has seen.
    """
    *earlier, rows = chunks(cache, rows, side)
    if earlier:
        assert starts is None, "a prompt begins at position 0"
        outs = _feed_earlier(model, cache, earlier, side, logits)
        whole = torch.cat([*outs, _forward(model, cache, rows, side, logits, None)], dim=1)
        return whole[:, -logits:] if logits else whole
    return _forward(model, cache, rows, side, logits, starts)


def chunks(cache: CompressedCache, rows: Sequence[Sequence[int]], side: str) -> list[list[Sequence[int]]]:
    """The rows' tokens in the chunks that the cache asks for, the last one whole; what is no prompt is one chunk."""
    width, size = max(map(len, rows)), cache.prefill_chunk
    if size is None or cache.mode != "prefill" or cache.prefill_end is not None or width <= size:
        return [list(rows)]
    if cache.facts.beyond(width):
        name, border = "prefill_evict" if cache.prefill_evicts else "prefill_chunk", cache.facts.border
        raise UserError(
            f"{name}={size} with a prompt of {width} tokens: beyond {border} tokens this model rotates every token by "
            "the length of the whole sequence, which a chunk does not know, so that chunks would give other answers; "
            f"leave {name} out, or take prompts of at most {border} tokens"
        )
    bounds = [0, *range((width - 1) % size + 1, width + 1, size)]
    padding = [width - len(row) if side == "left" else 0 for row in rows]
    return [
        [row[max(0, a - pad) : max(0, b - pad)] for row, pad in zip(rows, padding, strict=True)]
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]


def feed_beginning(model: PreTrainedModel, cache: CompressedCache, rows: Sequence[Sequence[int]]) -> None:
    """All chunks of left-padded prompts but the last, with which generate() goes on."""
    *earlier, _ = chunks(cache, rows, "left")
    _feed_earlier(model, cache, earlier, "left", 1)


@torch.no_grad()  # not inference_mode: generate() adds to these tensors outside of it
def _feed_earlier(
    model: PreTrainedModel, cache: CompressedCache, parts: Sequence[Sequence[Sequence[int]]], side: str, logits: int
) -> list[torch.Tensor]:
    """Logits of the chunks before the last; the cache is left as the last chunk, the end of the prefill, needs it."""
    with _before_the_last(cache, evicts=cache.prefill_evicts and side == "left"):
        return [_forward(model, cache, part, side, logits, None) for part in parts]


@contextmanager
def _before_the_last(cache: CompressedCache, evicts: bool) -> Iterator[None]:
    """Chunks that are stored only, or each cut to what the method keeps of the tokens so far."""
    compression = compression_of(cache)
    cache.mode = "hold"
    if evicts:
        every_chunk = Schedule(compress_every=1, skip_layers=compression.schedule.skip_layers)
        cache.mode, cache.compression = "decode", dataclasses.replace(compression, schedule=every_chunk)
    yield
    cache.mode, cache.compression, cache.decoded = "prefill", compression, 0
    cache.history.clear()


def _forward(
    model: PreTrainedModel,
    cache: CompressedCache,
    rows: Sequence[Sequence[int]],
    side: str,
    logits: int,
    starts: Sequence[int] | None,
) -> torch.Tensor:
    width = max(map(len, rows))
    starts = starts or cache.next_positions() or [0] * len(rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, part] = torch.tensor(row, dtype=torch.long)
        positions[b, part] = torch.arange(start, start + len(row))
        mask[b, part] = 1
    ragged = any(len(row) < width for row in rows)
    if cache.facts.border is not None:
        most = max(start + len(row) for row, start in zip(rows, starts, strict=True))
        assert len(rows) == 1 or not cache.facts.beyond(most), "one row's length would rotate the others"
        if not any(starts):
            assert cache.facts.rope is not None
            cache.facts.rope.forget(device_of(model))
    cache.next_counts = [len(row) for row in rows] if ragged else None
    padding = mask if ragged else None
    return logits_of(model, ids.to(device_of(model)), positions=positions, mask=padding, cache=cache, keep=logits)


def prefill(
    model: PreTrainedModel, new_cache: NewCache, rows: Sequence[Sequence[int]]
) -> tuple[CompressedCache, torch.Tensor]:
    """Prompts, left-padded, with a cut after the last token: the cache and the last token's logits [B, V]."""
    cache = new_cache()
    out = feed(model, cache, rows, side="left", logits=1)
    return cache, out[:, -1]

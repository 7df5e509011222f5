"""Texts read a second time before a cut, for methods that score pairs by what a repetition attends to.

The repetition follows on what the row has been fed, sees all of it and itself, and is stored nowhere. It costs as much
as feeding so many tokens does: of a prompt read again in whole, one to two times its prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import Words
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Reading
from kv_lm_eval.methods.compression import compression_of

Forward = Callable[[Sequence[Sequence[int]]], Any]  # one forward of each row's tokens


def words_of(tokenizer: Any) -> Words:
    """How to speak to a model with this tokenizer, in its chat format where it has one."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    if not getattr(tokenizer, "chat_template", None):
        return Words(encode)
    message, border = "what is said", "\n#####"
    said = [{"role": "user", "content": message + border}]
    text = str(tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False, enable_thinking=False))
    before, _, tail = text.partition(border)
    return Words(encode, encode(before.partition(message)[0]), encode(tail))


def after_forward(cache: CompressedCache, rows: Sequence[Sequence[int]], forward: Forward) -> None:
    """Notes the tokens of each row that a forward has fed, and makes the cuts that wait for a second reading.

    Args:
        forward: feeds rows to the model under this cache, and computes as few logits as it can.
    """
    for segment, members in zip(cache.segments, cache.members, strict=True):
        for text, row in zip(segment.texts, members, strict=True):
            text += rows[row]
    plans = [list[Reading]() for _ in rows]
    for segment, members in zip(cache.segments, cache.members, strict=True):
        if segment.unfinished and segment.asks_again:
            for text, done, row in zip(segment.texts, segment.read_again, members, strict=True):
                plans[row] = _readings(cache, text, done)
    for turn in range(max(map(len, plans), default=0)):
        _read(cache, [plan[turn] if turn < len(plan) else None for plan in plans], forward)
    for segment in cache.segments:
        if segment.unfinished:
            segment.end_forward(segment.waiting[0].tokens)


def _readings(cache: CompressedCache, text: Sequence[int], done: int) -> list[Reading]:
    facts, method = cache.facts, compression_of(cache).method
    words, longest = facts.words, facts.max_positions
    if words is None:
        raise UserError(
            f"method={method.name} asks the model to repeat the prompt, for which it needs a tokenizer: "
            "give it to kv_lm_eval.prefill(model, context, tokenizer=tokenizer), or evaluate with lm_eval"
        )
    found = method.readings(text, done, words)
    most = len(text) + max(len(reading.tokens) for reading in found)
    turns = facts.rope is not None and any(map(facts.rope.available, facts.modules))
    if longest is not None and most > longest and not turns:
        raise UserError(
            f"method={method.name} reads a prompt of {len(text)} tokens again behind itself, which takes {most} "
            f"positions, and the model has {longest}; take shorter prompts (max_length={longest // 2 - 64})"
        )
    return found


def _read(cache: CompressedCache, readings: Sequence[Reading | None], forward: Forward) -> None:
    """One forward of a reading of some rows each."""
    sizes = [None if r is None else (*r[:2], len(r.tokens)) for r in readings]
    cache.part(sizes)
    before = [segment.mode for segment in cache.segments]
    for segment, members in zip(cache.segments, cache.members, strict=True):
        reading = readings[members[0]]
        if reading is not None:
            seen = segment.seen[0]
            segment.mode, segment.part = "again", (seen - reading.first, seen - reading.last)
            segment.read_again = [reading.last] * segment.rows
    forward([[] if r is None else r.tokens for r in readings])
    for segment, mode in zip(cache.segments, before, strict=True):
        segment.mode = mode

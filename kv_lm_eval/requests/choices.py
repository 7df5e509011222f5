"""How choices are scored: lm-eval's `loglikelihood` requests, each distinct context prefilled once for all of its
continuations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine import recompute
from kv_lm_eval.engine.choices import Score, score_continuations
from kv_lm_eval.engine.question import alike
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics.latency import Stopwatch
from kv_lm_eval.progress import Bar
from kv_lm_eval.requests import boundaries
from kv_lm_eval.requests.halving import largest_batch

if TYPE_CHECKING:
    from kv_lm_eval.model import KVCompressedLM


def score_recomputed(
    lm: KVCompressedLM, requests: list[tuple[Any, list[int], list[int]]], length: int, disable_tqdm: bool
) -> list[Score]:
    """Every token of every continuation from a fresh forward over the `length` tokens before it."""
    size = 1 if lm.batch_size == "auto" else int(lm.batch_size)
    hidden, total = disable_tqdm or lm.rank != 0, sum(len(r[2]) for r in requests)
    with Bar(total=total, unit="tok", disable=hidden, desc="kvcompressed recomputed windows") as bar:
        contexts, continuations = [r[1] for r in requests], [r[2] for r in requests]
        scores = recompute.score_recomputed(
            lm._last_logits, contexts, continuations, length, size, lm.device, lm.softmax_dtype, bar.update
        )
    for request, score in zip(requests, scores, strict=True):
        if request[0] is not None:
            lm.cache_hook.add_partial("loglikelihood", request[0], score)
    return scores


def score_grouped(
    lm: KVCompressedLM, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool
) -> list[tuple[float, bool]]:
    """Groups requests by context, longest first, and scores each group's continuations over one prefill."""
    order = lm._tasks.get("order", [])  # empty when called directly, not through loglikelihood()
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (_, context, continuation) in enumerate(requests):
        both = (context + continuation)[-(lm.max_length + 1) :]
        groups[tuple(both[: len(both) - len(continuation)])].append(i)
    keys = sorted(groups, key=lambda c: (-len(c), c))
    if empty := [i for c in keys if not c for i in groups[c]]:
        raise UserError(
            f"request {empty[0]} has an empty context after truncation to {lm.max_length} "
            "tokens: its continuation "
            "alone is longer than the model's maximum"
        )

    def score(batch: Sequence[tuple[int, ...]]) -> tuple[list[list[Score]], CompressedCache, Stopwatch]:
        watch = lm._stopwatch()
        continuations = [[requests[i][2] for i in groups[c]] for c in batch]
        tails = [question(c).tail_tokens for c in batch] if lm._questions else lm.engine.tail_tokens
        new_cache = partial(lm._timed_cache, watch)
        with lm._autocast():
            scores, cache = score_continuations(lm.model, new_cache, batch, continuations, tails, lm.softmax_dtype)
        watch.end()
        return scores, cache, watch

    def text(context: tuple[int, ...]) -> str:
        strings = requests[groups[context][0]][0]
        return strings[0] if strings else str(context)

    def question(context: tuple[int, ...]) -> boundaries.Boundary:
        found = lm._questions.get(text(context), boundaries.Boundary(1, empty=True))
        return replace(found, tail_tokens=max(found.tail_tokens, lm.engine.tail_tokens))

    size = _contexts_per_batch(lm, keys, score)
    answers: dict[int, tuple[float, bool]] = {}
    bar = Bar(total=len(requests), disable=disable_tqdm or lm.rank != 0, desc="kvcompressed loglikelihood")
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    if lm._questions:
        tails = [[min(len(c), question(c).tail_tokens) for c in b] for b in batches]
        rows = zip(batches, (alike(t, lm.compression.schedule) for t in tails), strict=True)
        batches = [[b[i] for i in together] for b, groups_of_rows in rows for together in groups_of_rows]
    for batch, result in (part for b in batches for part in lm._halving.run(b, score, len)):
        assert result is not None
        scores, cache, watch = result
        for key, group in zip(batch, scores, strict=True):
            for i, answer in zip(groups[key], group, strict=True):
                answers[i] = answer
                if requests[i][0] is not None:
                    lm.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        end = cache.snapshot()
        tasks = [order[groups[c][0]] if order else "" for c in batch]
        prefilled = {**(cache.prefill_end or end), "seen": [len(c) for c in batch]}
        end["timing"] = watch.timings(len(batch), lm._first_of("loglikelihood"))
        end.update(boundaries.rows(list(map(question, batch))) if lm._questions else {})
        lm.compression_log.add_batch(tasks, list(map(text, batch)), "loglikelihood", prefilled, end)
        bar.update(sum(len(groups[c]) for c in batch))
    bar.close()
    return [answers[i] for i in range(len(requests))]


def _contexts_per_batch(lm: KVCompressedLM, keys: list[tuple[int, ...]], score: Callable[[Any], object]) -> int:
    if lm.batch_size != "auto":
        return int(lm.batch_size)
    if not lm._gains_by_batches or not keys:
        return 1
    return largest_batch(lambda n: score(keys[:1] * n), min(lm.max_batch_size, len(keys)))

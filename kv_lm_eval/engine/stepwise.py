"""A document token by token with a clock: what each step costs, cut included, and what the cache holds at it.

Slower than `streaming.score_documents` by a factor of tens and equal to it in every number; this is how a model that
generates would run, so it is what times are taken from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.forward import device_of
from kv_lm_eval.engine.prefill import NewCache, feed

Synchronise = Callable[[], None]


@dataclass
class Step:
    """One token fed.

    Attributes:
        fed: tokens fed so far, this one included. nll: of the token that it predicts, nats. correct: whether that was
            the most likely one. seconds: of the forward with its cut. slots: pairs per KV head that the query saw, in
            the layer that holds most. dropped: pairs per KV head cut after it, likewise. prefill: whether it was part
            of the first forward, which has no time of its own.
    """

    fed: int
    nll: float
    correct: bool
    seconds: float
    slots: int
    dropped: int
    prefill: bool = False


def synchroniser(model: PreTrainedModel) -> Synchronise:
    """Waits for the device, so that the clock shows work and not its launch."""
    device = device_of(model)
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


@torch.inference_mode()
def steps(
    model: PreTrainedModel, new_cache: NewCache, row: Sequence[int], prefill_tokens: int
) -> Iterator[tuple[Step, CompressedCache]]:
    """Feeds a row, the first `prefill_tokens` tokens (at least 1) in one forward, then one by one; scores row[1:].

    Yields a Step for each token fed but the last one of the row, and the cache as it is then.
    """
    cache, wait = new_cache(), synchroniser(model)
    fed = 0
    while fed < len(row) - 1:
        segment = list(row[fed : fed + max(prefill_tokens, 1)] if fed == 0 else row[fed : fed + 1])[
            : len(row) - 1 - fed
        ]
        before = largest(cache)
        wait()
        start = time.perf_counter()
        logits = feed(model, cache, [segment])[0]
        wait()
        seconds = time.perf_counter() - start
        log_probs = logits.float().log_softmax(-1)
        wanted = torch.tensor(row[fed + 1 : fed + 1 + len(segment)], device=logits.device)
        nll = -log_probs.gather(1, wanted[:, None])[:, 0]
        correct = log_probs.argmax(-1) == wanted
        held = before + len(segment)
        many = len(segment) > 1
        for i, (one, right) in enumerate(zip(nll.tolist(), correct.tolist(), strict=True)):
            last = i == len(segment) - 1
            yield (
                Step(
                    fed=fed + i + 1,
                    nll=one,
                    correct=right,
                    seconds=seconds if last else 0.0,
                    slots=before + i + 1,
                    dropped=held - largest(cache) if last else 0,
                    prefill=many,
                ),
                cache,
            )
        fed += len(segment)


def largest(cache: CompressedCache) -> int:
    """Pairs per KV head in the layer that holds most, of those that may be cut."""
    return max((round(held[0]) for i, held in enumerate(cache.held) if held and cache.facts.compressible(i)), default=0)

"""A comparison of many methods: each with a prefill of its own, and all from one (`engine/together.py`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kv_lm_eval.bench.measure import Bench
from kv_lm_eval.bench.timing import rounds
from kv_lm_eval.cache.cache import side_by_side
from kv_lm_eval.engine.prefill import NewCache, feed
from kv_lm_eval.engine.together import for_each, may_share, prefill_for_all

METHODS = ("snapkv", "adakv", "pyramidkv", "knorm", "keydiff", "tova", "lagkv", "random")
SIZES = (1, 2, 4)  # parts of the capacity
LEAST = 40  # slots, of which a window of 32 leaves some to be chosen


def points(bench: Bench, count: int) -> list[NewCache]:
    """So many different compressions, the full cache among them."""
    settings = [(name, max(LEAST, bench.capacity // part)) for part in SIZES for name in bench.usable(METHODS)]
    made = [bench.new_cache("full"), *(bench.new_cache(*one) for one in settings)]
    return [new_cache for new_cache in made if may_share(new_cache())][:count]


@torch.inference_mode()
def compared(bench: Bench, prompt: int, new_tokens: int, counts: tuple[int, ...] = (12, 20)) -> dict[str, Any]:
    """One prompt with its answer under each of several methods: time of all of them one by one, and together."""
    row = bench.tokens(prompt)

    def work(new_caches: list[NewCache]) -> None:
        caches, logits = prefill_for_all(bench.model, new_caches, [row])
        cache, last = side_by_side(caches), for_each(logits, 1, len(caches))
        cache.gather()
        for _ in range(new_tokens - 1):
            tokens = [[int(last[i].argmax())] for i in range(len(new_caches))]
            last = feed(bench.model, cache, tokens, keep=1)

    def one_by_one(new_caches: list[NewCache]) -> None:
        for new_cache in new_caches:
            work([new_cache])

    found = {}
    for count in counts:
        new_caches = points(bench, count)
        works: dict[str, Callable[[], object]] = {
            "one by one": partial(one_by_one, new_caches),
            "together": partial(work, new_caches),
        }
        times = rounds(works, bench.device, min(bench.repeats, 2), 0)
        found[str(len(new_caches))] = {name: t.record(bench.clock) for name, t in times.items()}
    return {"prompt": prompt, "new_tokens": new_tokens, "methods": found}

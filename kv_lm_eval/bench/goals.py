"""What was promised of the speed, each a ratio measured in one run, with its goal beside it.

The entries of a ratio take turns; a ratio is that of the least times, which a machine that others use spares most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from kv_lm_eval.bench import card
from kv_lm_eval.bench.measure import Bench, in_chunks
from kv_lm_eval.bench.timing import Stopwatch, rounds
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.engine.compiled import Decoder
from kv_lm_eval.engine.prefill import NewCache, feed, prefill

SCORERS = ("expected_attention", "adakv", "lagkv", "snapkv_comp")
ONLINE = ("h2o", "tova", "streaming_llm", "streaming_ring")
STEPS = 32
ROUNDS = 3


class Ratio(NamedTuple):
    """One promise: what is divided by what, at most how much, and what was measured."""

    name: str
    goal: float
    measured: float


Works = dict[str, Callable[[], object]]


@torch.inference_mode()
def goals(bench: Bench, lengths: Sequence[int]) -> dict[str, Any]:
    """All ratios; lengths: prompts of those that depend on them, the first of the scorers, the last of the longest."""
    found = [
        *chunked(bench, lengths[1:]),
        ragged(bench, lengths[-1]),
        *scorers(bench, lengths[0]),
        *per_token(bench, bench.capacity),
        *compiled(bench, (bench.capacity, lengths[0])),
    ]
    return {"ratios": [ratio._asdict() for ratio in found]}


def least(bench: Bench, works: Works, repeats: int = ROUNDS, warm_up: int = 1) -> dict[str, float]:
    """The least seconds of each, in turn."""
    times = rounds(works, bench.device, repeats, warm_up)
    return {name: min(t.cpu_s if bench.clock == "cpu" else t.wall_s) for name, t in times.items()}


def chunked(bench: Bench, lengths: Sequence[int]) -> Iterator[Ratio]:
    """A prompt in chunks of 1,024 against one forward."""
    for n in lengths:
        row, caches = bench.tokens(n), {"one": bench.new_cache("full"), "chunks": in_chunks(bench, "full", 1024, False)}
        works: Works = {k: partial(prefill, bench.model, c, [row]) for k, c in caches.items()}
        t = least(bench, works, 2)
        yield Ratio(f"prefill_chunk=1024 of one forward, {n} tokens", 1.1, t["chunks"] / t["one"])


def ragged(bench: Bench, n: int) -> Ratio:
    """Two prompts of unlike lengths in one batch against each alone."""
    rows = [bench.tokens(n), bench.tokens(n // 4, 1)]
    both: NewCache = bench.new_cache("full")

    def alone() -> None:
        for row in rows:
            prefill(bench.model, both, [row])

    t = least(bench, {"pair": partial(prefill, bench.model, both, rows), "alone": alone}, 2)
    return Ratio(f"a batch of {n} and {n // 4} tokens of the two alone", 1.1, t["pair"] / t["alone"])


def scorers(bench: Bench, n: int) -> Iterator[Ratio]:
    """What is scored and cut, moments of the queries too, of the full cache's prefill; all of h2o of it."""
    row, spent = bench.tokens(n), dict.fromkeys(bench.usable(SCORERS), float("inf"))

    def work(method: str) -> None:
        clock = Stopwatch(bench.device)

        def new_cache() -> CompressedCache:
            cache = bench.new_cache(method)()
            cache.around_cut = lambda: clock
            return cache

        with also(clock, Segment, "add_moments"):
            prefill(bench.model, new_cache, [row])
        if method in spent:
            spent[method] = min(spent[method], clock.total)

    t = least(bench, {method: partial(work, method) for method in ("full", "h2o", *spent)})
    for method in spent:
        yield Ratio(f"{method}: scores and cuts of the prefill of {n} tokens", 0.03, spent[method] / t["full"])
    yield Ratio(f"h2o: prefill of {n} tokens of the full cache's", 1.25, t["h2o"] / t["full"])


@contextmanager
def also(watch: Stopwatch, cls: type, name: str) -> Iterator[None]:
    """Counts the calls of a method too."""
    original = getattr(cls, name)

    def counted(*args: Any) -> Any:
        with watch:
            return original(*args)

    setattr(cls, name, counted)
    try:
        yield
    finally:
        setattr(cls, name, original)


def steps_over(bench: Bench, cache: CompressedCache) -> None:
    """Decode steps, cut included."""
    for _ in range(STEPS):
        bench.step(cache, 1)


def per_token(bench: Bench, slots: int) -> Iterator[Ratio]:
    """A step with a cut against a step of the full cache at as many slots."""
    works: Works = {}
    for method in bench.usable(["full", *ONLINE]):
        length = max(1, slots - STEPS * ROUNDS // 2) if method == "full" else slots + 64
        works[method] = partial(
            steps_over, bench, prefill(bench.model, bench.new_cache(method, slots), [bench.tokens(length)])[0]
        )
    t = least(bench, works)
    for method in list(works)[1:]:
        yield Ratio(f"{method}: a step with its cut of the full cache's at {slots} slots", 1.05, t[method] / t["full"])


def compiled(bench: Bench, slots: Sequence[int]) -> Iterator[Ratio]:
    """Compiled steps of the full cache and of one cut after its prompt, alone and in a batch: against the same without
    compiling, what is not a matrix product of either, and the least that bandwidth allows."""
    bytes_of = card.static(bench.model, None)
    products = least(bench, {"products": partial(_products, bench)}, 20)["products"]
    for n in slots:
        for method, rows in (("full", 1), ("snapkv", 1), ("snapkv", 4)):
            texts = [bench.tokens(n if method == "full" else n + 64, i) for i in range(rows)]
            caches = [prefill(bench.model, bench.new_cache(method, n), texts)[0] for _ in range(2)]
            decoder = Decoder(bench.model)
            static, ids = decoder.start(caches[0], STEPS * (ROUNDS + 2)), torch.ones(rows, 1, dtype=torch.long)
            token = ids.to(bench.device)
            t = least(
                bench,
                {
                    "eager": partial(_eager, bench, caches[1], rows),
                    "compiled": partial(_compiled, decoder, static, token),
                },
            )
            what = f"{method}, {rows} row{'s' * (rows > 1)}, {n} slots"
            yield Ratio(f"compiled step of the same not compiled ({what})", 1.0, t["compiled"] / t["eager"])
            if rows == 1:
                beside = [max(0.0, x / STEPS - products) for x in (t["compiled"], t["eager"])]
                yield Ratio(
                    f"compiled step beside its matrix products, of not compiled ({what})", 0.5, beside[0] / beside[1]
                )
                read = bytes_of["weight_bytes_read_per_step"] + n * bytes_of["kv_bytes_per_token"]
                floor = read / bytes_of["weight_bytes_read_per_step"] * products
                yield Ratio(
                    f"compiled step of what its products and pairs take ({what})", 1.5, t["compiled"] / STEPS / floor
                )
            torch._dynamo.reset()


def _eager(bench: Bench, cache: CompressedCache, rows: int) -> None:
    for _ in range(STEPS):
        logits = feed(bench.model, cache, [[1]] * rows, keep=1)
        [int(x.argmax()) for x in logits.values()]


def _compiled(decoder: Decoder, static: Any, token: torch.Tensor) -> None:
    for _ in range(STEPS):
        decoder.step(static, token).argmax(-1).tolist()


def _products(bench: Bench) -> None:
    """A step's products with the weights and nothing else."""
    for module in bench.model.modules():
        if isinstance(module, nn.Linear):
            linear(module.weight.new_zeros(1, module.in_features), module.weight)

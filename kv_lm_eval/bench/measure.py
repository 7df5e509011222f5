"""What is measured: each function is one table of the card, all methods in it through the same loop.

Prompts are random token ids of fixed lengths, outputs have a fixed number of tokens, decoding is greedy. Every entry is
{"times" or a number, ...} by name; `baseline` in a table names the entry that ratios are taken to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from kv_lm_eval import config
from kv_lm_eval.bench.live_bytes import LiveBytes
from kv_lm_eval.bench.timing import Stopwatch, clock_of, rounds, synchronise
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts, Words
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.compiled import Decoder
from kv_lm_eval.engine.fidelity import score_beside
from kv_lm_eval.engine.forward import device_of, logits_of
from kv_lm_eval.engine.prefill import NewCache, feed, prefill
from kv_lm_eval.engine.question import Contexts, Tails, prefill_before_question
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import base
from kv_lm_eval.methods import storage as storages
from kv_lm_eval.metrics.latency import spread
from kv_lm_eval.metrics.memory import PeakMemory

RECOMPUTE = "window recompute"
QUESTIONS = (5, 20)  # on one context
WRAPPED = {  # methods that ask less and less of a model, and what one that serves them can do
    "streaming_llm": {"movable": True, "in_cache": True},
    "expected_attention": {"movable": True, "in_cache": False},
    "full": {"movable": False, "in_cache": False},
}


def all_methods() -> list[str]:
    """Those that can be measured at a budget of slots, and first the full cache, beside them."""
    found = [name for name in base.available() if _takes_slots(base.load(name))]
    return sorted(found, key=lambda name: (name != "full", name))


def _takes_slots(method: type[base.Method]) -> bool:
    holds_less = bool(config.STORAGE_KEYS & set(method.presets))  # a form of storage, measured with these
    return method.uses_cache and not holds_less and (method.takes_budget or not method.compresses)


@dataclass
class Bench:
    """A wrapped model and how it is measured.

    Args:
        movable: whether keys can be moved in position, as some methods must; in_cache: and counted in the cache.
        repeats, warm_up: rounds. capacity: slots per KV head that methods keep. seed: of the prompts.
    """

    model: PreTrainedModel
    facts: ModelFacts
    movable: bool = True
    in_cache: bool = True
    repeats: int = 5
    warm_up: int = 2
    capacity: int = 512
    seed: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel, **more: Any) -> Bench:
        """Wraps the model for methods that move keys, and for the others where it has no way to."""
        for method, able in WRAPPED.items():
            settings = {"method": method} | ({"max_capacity_prompt": 64} if able["movable"] else {})
            try:
                bench = cls(model, wrap(model, config.parse(settings)[0]), **able, **more)
            except UserError:
                if not able["movable"]:
                    raise
                continue
            break
        bench.facts.words = Words(lambda text: list(range(len(text.split()))))  # of any tokens: as many as words
        return bench

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def clock(self) -> str:
        return clock_of(self.device)

    def new_cache(self, method: str, slots: int | None = None) -> NewCache:
        """Makes caches of a method that keeps so many slots (default: capacity)."""
        settings: dict[str, Any] = {"method": method}
        size = self.capacity if slots is None else slots
        cls = base.load(method)
        if cls.needs_training:
            settings |= cls.example(size)  # made-up weights cost as much
        elif cls.compresses:
            settings["max_capacity_prompt"] = size
        if not self.in_cache and "positions" in {f.name for f in fields(cls)}:
            settings["positions"] = "absolute"  # what a user of this model can run
        return partial(make_cache, config.parse(settings)[0], self.facts)

    def tokens(self, length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + seed)
        vocab = self.model.config.get_text_config().vocab_size
        return torch.randint(vocab, (length,), generator=generator).tolist()

    def usable(self, methods: Sequence[str]) -> list[str]:
        """Those of the methods that this model can be run with."""
        return [m for m in methods if self.movable or self.new_cache(m)().compression.moves_keys is None]

    def step(self, cache: CompressedCache, token: int) -> int:
        """One decode step, its token read back as generation must."""
        return int(feed(self.model, cache, [[token]], keep=1)[0].argmax())


@torch.inference_mode()
def generation(bench: Bench, methods: Sequence[str], prompt: int, new_tokens: int) -> dict[str, Any]:
    """Whole requests, window recompute among them: times to first and further tokens, throughput, bytes, peaks."""
    row = bench.tokens(prompt)
    memory = PeakMemory({p.device for p in bench.model.parameters()})
    firsts: dict[str, list[tuple[float, float]]] = {name: [] for name in (*methods, RECOMPUTE)}
    kept: dict[str, dict[str, Any]] = {name: {} for name in firsts}

    def moment() -> tuple[float, float]:
        synchronise(bench.device)
        return time.perf_counter(), time.process_time()

    def generate(method: str) -> None:
        memory.restart()
        start = moment()
        cache, logits = prefill(bench.model, bench.new_cache(method), [row])
        token = int(logits[0].argmax())
        first = moment()
        kept[method]["prefill_peak_bytes"] = memory.read()
        memory.restart()
        firsts[method].append((first[0] - start[0], first[1] - start[1]))
        for _ in range(new_tokens - 1):
            token = bench.step(cache, token)
        kept[method]["decode_peak_bytes"] = memory.read()
        kept[method]["kv_bytes"] = int(cache.snapshot()["kv_bytes_valid"][0])

    def recompute() -> None:
        ids, start = list(row), moment()
        for i in range(new_tokens):
            window = torch.tensor([ids[-bench.capacity :]], device=bench.device)
            cache = bench.new_cache("full")()  # our attention wants one; it is thrown away after each token
            ids.append(int(logits_of(bench.model, window, cache=cache, keep=1)[0, -1].argmax()))
            if i == 0:
                first = moment()
                firsts[RECOMPUTE].append((first[0] - start[0], first[1] - start[1]))
        kept[RECOMPUTE].update(kv_bytes=0, prefill_peak_bytes=None, decode_peak_bytes=None)

    works: dict[str, Callable[[], None]] = {m: partial(generate, m) for m in methods}
    times = rounds({**works, RECOMPUTE: recompute}, bench.device, bench.repeats, bench.warm_up)
    which = 1 if bench.clock == "cpu" else 0
    out = {}
    for name, total in times.items():
        ttft = [t[which] for t in firsts[name][bench.warm_up :]]
        totals = total.cpu_s if bench.clock == "cpu" else total.wall_s
        tpot = [(t - f) / (new_tokens - 1) for t, f in zip(totals, ttft, strict=True)]
        out[name] = {
            "ttft_s": spread(ttft),
            "tpot_s": {**spread(tpot), "rounds": tpot},
            "tokens_per_s": spread([new_tokens / t for t in totals]),
            "wall_total_s": spread(total.wall_s)["median"],
            **kept[name],
        }
    return {"prompt": prompt, "new_tokens": new_tokens, "capacity": bench.capacity, "entries": out}


@torch.inference_mode()
def decode(bench: Bench, methods: Sequence[str], slots: Sequence[int], steps: int = 64) -> dict[str, Any]:
    """Seconds a decode step, cut included, at several numbers of slots; the full cache holds as many tokens."""
    out: dict[str, Any] = {}
    fed = steps * (bench.repeats + bench.warm_up)
    for n in slots:
        caches, works = {}, {}
        for method in methods:
            length = max(1, n - fed // 2) if method == "full" else n + 64
            cache, _ = prefill(bench.model, bench.new_cache(method, n), [bench.tokens(length)])
            caches[method] = cache

            def some_steps(cache: CompressedCache = cache) -> None:
                token = 1
                for _ in range(steps):
                    token = bench.step(cache, token)

            works[method] = some_steps
        times = rounds(works, bench.device, bench.repeats, bench.warm_up, per=steps)
        out[str(n)] = {
            name: {**t.record(bench.clock), "kv_bytes": int(caches[name].snapshot()["kv_bytes_valid"][0])}
            for name, t in times.items()
        }
    return {"steps": steps, "slots": out}


@torch.inference_mode()
def storage(bench: Bench, slots: int, steps: int = 16) -> dict[str, Any]:
    """Seconds a decode step and bytes of keys and values, in every form in which they may be held, nothing evicted."""
    forms: dict[str, dict[str, Any]] = {"full": {"method": "full"}}
    for kind in map(storages.load, storages.available()[1:]):
        settings = {"method": "quantized", **kind.example()}
        forms[config.parse(settings)[0].storage.words] = settings
    caches, works = {}, {}
    for name, settings in forms.items():
        new_cache = partial(make_cache, config.parse(settings)[0], bench.facts)
        caches[name], _ = prefill(bench.model, new_cache, [bench.tokens(slots)])

        def some_steps(cache: CompressedCache = caches[name]) -> None:
            token = 1
            for _ in range(steps):
                token = bench.step(cache, token)

        works[name] = some_steps
    times = rounds(works, bench.device, bench.repeats, min(bench.warm_up, 1), per=steps)
    entries = {
        name: {**t.record(bench.clock), "kv_bytes": int(caches[name].snapshot()["kv_bytes_valid"][0])}
        for name, t in times.items()
    }
    return {"slots": slots, "entries": entries}


@torch.inference_mode()
def prefills(bench: Bench, methods: Sequence[str], prompt: int) -> dict[str, Any]:
    """Seconds of a prefill with its cut, and the share of it spent in cuts (scoring and gathering)."""
    row = bench.tokens(prompt)
    in_cuts: dict[str, list[float]] = {m: [] for m in methods}

    def work(method: str) -> None:
        cuts = Stopwatch(bench.device)

        def new_cache() -> CompressedCache:
            cache = bench.new_cache(method)()
            cache.around_cut = lambda: cuts
            return cache

        prefill(bench.model, new_cache, [row])
        in_cuts[method].append(cuts.total)

    times = rounds({m: partial(work, m) for m in methods}, bench.device, bench.repeats, bench.warm_up)
    entries = {m: {**t.record(bench.clock), "cut_s": spread(in_cuts[m][bench.warm_up :])} for m, t in times.items()}
    return {"prompt": prompt, "capacity": bench.capacity, "entries": entries}


@torch.inference_mode()
def memory(bench: Bench, prompts: Sequence[int], chunk: int) -> dict[str, Any]:
    """Peak bytes above the weights of a prefill: in one forward, in chunks, and in chunks with cuts between."""
    out: dict[str, Any] = {}
    for n in prompts:
        row = bench.tokens(n)
        out[str(n)] = {
            "full": peak_bytes(bench, bench.new_cache("full"), row),
            "h2o": peak_bytes(bench, bench.new_cache("h2o"), row),
            "snapkv": peak_bytes(bench, bench.new_cache("snapkv"), row),
            f"snapkv, prefill_chunk={chunk}": peak_bytes(bench, in_chunks(bench, "snapkv", chunk, False), row),
            f"streaming_llm, prefill_evict={chunk}": peak_bytes(
                bench, in_chunks(bench, "streaming_llm", chunk, True), row
            ),
        }
    return {"chunk": chunk, "capacity": bench.capacity, "prompts": out}


def in_chunks(bench: Bench, method: str, chunk: int, evicts: bool) -> NewCache:
    """Makes caches whose prompts are fed in chunks."""
    return partial(make_cache, bench.new_cache(method)().compression, bench.facts, chunk, evicts)


def peak_bytes(bench: Bench, new_cache: NewCache, row: Sequence[int]) -> int:
    """Of live tensors, above the weights: the allocator's own peak on CUDA, counted elsewhere."""
    memory = PeakMemory({p.device for p in bench.model.parameters()})
    if memory.devices:
        memory.restart()
        prefill(bench.model, new_cache, [row])
        return memory.read() or 0
    with LiveBytes([*bench.model.parameters(), *bench.model.buffers()]) as live:
        prefill(bench.model, new_cache, [row])
    return live.peak


@torch.inference_mode()
def scoring(bench: Bench, tokens: int, loop_tokens: int = 64) -> dict[str, Any]:
    """Log-likelihood of a text under streaming_llm, exact: the band, the token loop, and one full forward."""
    document = bench.tokens(tokens)
    new_cache = bench.new_cache("streaming_llm")
    cache, _ = prefill(bench.model, new_cache, [bench.tokens(bench.capacity + 64)])

    def loop() -> None:
        for token in document[:loop_tokens]:
            bench.step(cache, token)

    works: Mapping[str, Callable[[], object]] = {
        "band": lambda: score_documents(bench.model, new_cache, [document], Stream(1, 1)),
        "full forward": lambda: score_documents(bench.model, bench.new_cache("full"), [document], Stream(1, 1)),
        "token loop": loop,
    }
    per = {"band": tokens, "full forward": tokens, "token loop": loop_tokens}
    times = rounds(works, bench.device, bench.repeats, bench.warm_up, per)
    return {"tokens": tokens, "entries": {name: t.record(bench.clock) for name, t in times.items()}}


@torch.inference_mode()
def fidelity(bench: Bench, methods: Sequence[str], tokens: int) -> dict[str, Any]:
    """A text under each method alone, and with the full cache beside it and every distribution compared."""
    document = bench.tokens(tokens)
    works: dict[str, Callable[[], object]] = {}
    for method in methods:
        asked = (bench.model, bench.new_cache(method), [document], Stream(1, 64))
        works[f"{method} alone"] = partial(score_documents, *asked)
        works[f"{method} beside full"] = partial(score_beside, *asked)
    times = rounds(works, bench.device, bench.repeats, bench.warm_up, per=tokens)
    return {"tokens": tokens, "methods": list(methods), "entries": {n: t.record(bench.clock) for n, t in times.items()}}


@torch.inference_mode()
def shared_prefix(bench: Bench, context: int, choices: Sequence[int]) -> dict[str, Any]:
    """Several continuations of one context: one prefill for all, against context and continuation again for each."""
    row = bench.tokens(context)
    out = {}
    for k in choices:
        group = [bench.tokens(8 + 22 * i // max(1, k - 1), seed=i) for i in range(k)]

        def together(method: str, group: list[list[int]] = group) -> None:
            score_continuations(bench.model, bench.new_cache(method), [row], [group], 1)

        def again(group: list[list[int]] = group) -> None:
            for one in group:  # a single continuation under the full cache is one plain forward
                score_continuations(bench.model, bench.new_cache("full"), [row], [[one]], 1)

        works: dict[str, Callable[[], object]] = {
            "recompute": again,
            "full, one prefill": partial(together, "full"),
            "snapkv, one prefill": partial(together, "snapkv"),
        }
        times = rounds(works, bench.device, bench.repeats, min(bench.warm_up, 1))
        out[str(k)] = {name: t.record(bench.clock) for name, t in times.items()}
    return {"context": context, "choices": out, "questions": {str(n): _questions(bench, row, n) for n in QUESTIONS}}


def _questions(bench: Bench, context: list[int], n: int) -> dict[str, Any]:
    """Several questions on one context under snapkv, each with an answer of 8 tokens: the context read again for each,
    read once for all, and the reading alone."""
    questions = [bench.tokens(24, seed=i) for i in range(n)]
    new_cache = bench.new_cache("snapkv")

    def ask(contexts: Contexts | None) -> None:
        for question in questions:
            tails = Tails([len(question)], contexts or Contexts([context]))
            cache = prefill_before_question(bench.model, new_cache, [[*context, *question]], tails)
            token = question[-1]
            for _ in range(8):
                token = bench.step(cache, token)

    works: dict[str, Callable[[], object]] = {
        "the context for each": lambda: ask(None),
        "the context once": lambda: ask(Contexts([context] * n)),
        "the context alone": lambda: prefill(bench.model, new_cache, [context]),
    }
    times = rounds(works, bench.device, bench.repeats, min(bench.warm_up, 1))
    return {name: t.record(bench.clock) for name, t in times.items()}


@torch.inference_mode()
def compiled(bench: Bench, slots: int, steps: int = 16) -> dict[str, Any]:
    """Seconds a step of streaming_ring, eager and compiled, and of the full cache at as many slots."""
    rows = bench.tokens(slots + 64)
    ring = bench.new_cache("streaming_ring", slots)
    eager, logits = prefill(bench.model, ring, [rows])
    full, _ = prefill(bench.model, bench.new_cache("full"), [rows[:slots]])
    start = time.perf_counter()
    decoder = Decoder(bench.model)
    static = decoder.start(prefill(bench.model, ring, [rows])[0], 0)
    ids = logits[0].argmax(-1, keepdim=True)
    apart = float((decoder.step(static, ids) - feed(bench.model, eager, [ids[0].tolist()], keep=1)[0]).abs().max())
    compile_s = time.perf_counter() - start

    def eager_steps(cache: CompressedCache) -> None:
        token = 1
        for _ in range(steps):
            token = bench.step(cache, token)

    def compiled_steps() -> None:
        token = ids
        for _ in range(steps):
            token = decoder.step(static, token).argmax(-1, keepdim=True)

    works: dict[str, Callable[[], object]] = {
        "full": partial(eager_steps, full),
        "streaming_ring": partial(eager_steps, eager),
        "streaming_ring compiled": compiled_steps,
    }
    times = rounds(works, bench.device, bench.repeats, max(bench.warm_up, 2), per=steps)
    entries = {name: t.record(bench.clock) for name, t in times.items()}
    return {"slots": slots, "compile_s": compile_s, "max_abs_difference": apart, "entries": entries}

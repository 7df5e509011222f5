"""A row's answer, kept set, codes, statistics and bytes are functions of its own tokens, whatever stands beside it.

Random cases in float64: a model, a method with a composition of settings, a kind of request and a batch of rows of
random lengths from one token on. Every row of the batch must come out as it does alone.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import tiny
import torch

from kv_lm_eval.cache import hook
from kv_lm_eval.cache.band import Band
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.forward import generate_with
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.engine.generate import by_rows
from kv_lm_eval.engine.start import start
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.compression import Compression

MODELS = ("llama", "qwen3", "gpt_neox", "gpt2", "mistral_sliding", "gemma2", "gemma3", "phi3", "starcoder2")
KINDS = ("generation", "choices", "documents")
NEW = 12
SEED = 20

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "full": [{}],
    "window": [{}],
    "streaming_llm": [
        {"window_size": 12, "n_sink": 2},
        {"window_size": 12, "n_sink": 2, "positions": "absolute"},
        {"window_size": 10, "n_sink": 2, "positions": "absolute", "compress_every": 4, "cache_slack": 2, "max_drop": 3},
        {"window_size": 12, "n_sink": 2, "refresh_budget": 2, "refresh_policy": "uniform", "compress_every": 4},
    ],
    "streaming_ring": [{"window_size": 12, "n_sink": 2}, {"window_size": 12, "n_sink": 2, "positions": "absolute"}],
    "head_aware": [{}],
    "knorm": [{}, {"recent_protected": 3}],
    "l2_fixed": [{"cache_size": 14}, {"cache_size": 14, "strategy": "random"}],
    "snapkv": [{"window_size": 4, "kernel_size": 3}, {"window_size": 4, "gqa": "query_head"}],
    "snapkv_comp": [{"window_size": 4, "kernel_size": 3, "block_size": 5}],
    "pyramidkv": [{"window_size": 4}],
    "adakv": [{"window_size": 4}],
    "h2o": [{"window_size": 4}],
    "tova": [{}],
    "expected_attention": [{}],
    "keydiff": [{}],
    "lagkv": [{"lag_size": 4, "n_sink": 2}],
    "random": [{}],
    "quest": [
        {"token_budget": 12, "page_size": 4, "dense_layers": 0},
        {"token_budget": 1, "page_size": 3, "dense_layers": 1},
    ],
    "kvzip": [{"n_sink": 2, "chunk_size": 16}, {"layer_budget": "uniform"}, {"compress_every": 5}, {"plus": True}],
    "quantized": [{}],
}
for new in tiny.methods(lambda cls: cls.uses_cache):  # of which nothing more is known here
    SETTINGS.setdefault(new, [tiny.example(new, 12)])
BUDGETS = [{"max_capacity_prompt": 16}, {"max_capacity_prompt": 9}, {"keep_ratio": 0.5}, {"compression_ratio": 0.3}]
BUDGETS += [{"threshold": -3.0, "threshold_recent": 4}, {"threshold": 0.05, "threshold_recent": 2, "compress_every": 4}]
PARTS: list[dict[str, Any]] = [
    {"layer_budget": "pyramid"},
    {"layer_budget": "global"},
    {"layer_budget": "global", "compress_every": 3},
    {"head_budget": "ada"},
    {"head_budget": "ada", "layer_budget": "pyramid"},
    {"evicted": "cam"},
    {"evicted": "d2o"},
    {"evicted": "compensate", "weight": "uniform", "block_size": 4},
    {"evicted": "compensate", "weight": "uniform", "block_size": 4, "key_space": "pre_rope", "count_bias": "log_n"},
    {"skip_layers": 0},
    {"compress_every": 1},
    {"compress_every": 5},
    {"nbits": 4, "residual_length": 8, "group_size": 4},
    {"nbits": 2, "residual_length": 4, "group_size": 4, "compress_every": 3},
    {"nbits": 8, "residual_length": 8, "group_size": 8, "evicted": "compensate", "weight": "uniform", "block_size": 4},
    {"prune_after": 10},
    {"unit": "chunk", "unit_size": 3},
    {"k_bits": 4, "v_bits": 3, "residual_length": 8, "group_size": 4},
    {"kv_cache_dtype": "fp8"},
    {"kv_cache_dtype": "turboquant"},
    {},
    {},
]


@functools.cache
def model(name: str) -> tuple[Any, Any]:
    """A model in float64 under our attention, and what is known of it; where keys can be moved, that too."""
    for compression in (tiny.compression(method="expected_attention", max_capacity_prompt=8), FULL):
        built = tiny.build(name)
        try:
            facts = wrap(built, compression)  # in float32: gemma2's own attention is NaN for padding in float64
        except UserError:
            continue
        facts.words = tiny.WORDS
        hook.show_hidden(facts.modules.values())
        return built.double(), facts
    raise AssertionError(name)


@dataclass
class Case:
    """One random case; `words` reproduces it."""

    name: str
    kind: str
    compression: Compression
    chunk: int | None
    question: bool
    rows: list[list[int]]
    tails: list[int]
    continuations: list[list[list[int]]]
    tail_tokens: int
    prefill_tokens: int
    stock: bool  # generate()'s own loop over left-padded prompts, or ours over packed ones
    words: str


def draw(rng: random.Random) -> Case:
    """A case that the settings allow on its model."""
    while True:
        name, kind, method = rng.choice(MODELS), rng.choice(KINDS), rng.choice(list(SETTINGS))
        settings = {"method": method, **rng.choice(SETTINGS[method])}
        if rng.random() < 0.9:
            settings |= rng.choice(PARTS)
        if rng.random() < 0.9:
            settings |= rng.choice(BUDGETS)
        try:
            compression = tiny.compression(**settings)
            _, facts = model(name)
            if compression.moves_keys is not None and (not facts.rope_kinds or "other" in facts.rope_kinds):
                continue
            if compression.method.in_cache_sinks and facts.all_sliding:
                continue
            compression.method.check_model(facts)
        except UserError:
            continue
        longest = rng.choice((8, 40, 110))
        lengths = [rng.randint(1, longest) for _ in range(rng.randint(2, 4))]
        rows = [tiny.tokens(n, seed=rng.randint(0, 10**6)) for n in lengths]
        return Case(
            name,
            kind,
            compression,
            chunk=rng.choice((None, None, 3, 16)) if kind != "documents" else None,
            question=rng.random() < 0.5 and kind != "documents",
            rows=rows,
            tails=[rng.randint(1, n if rng.random() < 0.3 else max(1, n // 3)) for n in lengths],
            continuations=[
                [tiny.tokens(rng.randint(1, 6), seed=rng.randint(0, 10**6)) for _ in range(rng.randint(1, 3))]
                for _ in rows
            ],
            tail_tokens=rng.choice((0, 1, 1, 4)),
            prefill_tokens=rng.choice((0, 7)),
            stock=rng.random() < 0.3 and not compression.method.reads_again,
            words=f"{name} {kind} {settings} lengths={lengths}",
        )


def generated(m: Any, new_cache: Callable[[], CompressedCache], case: Case, some: list[int]) -> tuple[Any, Any]:
    with torch.no_grad():
        tails = [case.tails[i] for i in some] if case.question else None
        cache, ids, mask, _ = start(m, new_cache, [case.rows[i] for i in some], tails, 0)
        out = m.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
            **generate_with(cache),
            **({} if case.stock else by_rows(cache)),
        )
    return torch.stack(out.logits, dim=1), cache


def choices(m: Any, new_cache: Callable[[], CompressedCache], case: Case, some: list[int]) -> tuple[Any, Any]:
    tails = [case.tails[i] for i in some] if case.question else case.tail_tokens
    rows, continuations = [case.rows[i] for i in some], [case.continuations[i] for i in some]
    scores, cache = score_continuations(m, new_cache, rows, continuations, tails)
    return [torch.tensor([s for s, _ in group], dtype=torch.float64) for group in scores], cache


def documents(m: Any, new_cache: Callable[[], CompressedCache], case: Case, some: list[int]) -> tuple[Any, Any]:
    rows, every = [case.rows[i] for i in some], case.compression.schedule.compress_every or 5
    scored, cache = score_documents(m, new_cache, rows, Stream(1, every, prefill_tokens=case.prefill_tokens))
    return [s.log_probs for s in scored], cache


ROADS = {"generation": generated, "choices": choices, "documents": documents}


def outcome(case: Case, some: list[int]) -> list[dict[str, Any]]:
    """For each of these rows run together: its numbers, and what its cache holds at the end."""
    m, facts = model(case.name)
    new_cache = partial(make_cache, case.compression, facts, case.chunk)
    numbers, cache = ROADS[case.kind](m, new_cache, case, some)
    return described(numbers, cache, len(some))


def described(numbers: Any, cache: CompressedCache, rows: int) -> list[dict[str, Any]]:
    """The same of a run that has been made."""
    snapshot = cache.snapshot() if cache.batch else {}
    found = []
    for b in range(rows):
        held = []
        segment, row = cache.of_row(b) if cache.batch else (None, 0)
        for store in [] if segment is None or isinstance(segment, Band) or not segment.seen[row] else segment.stores:
            pos = store.pos[row]
            for head in range(store.keys.shape[1]):
                at = pos[head if pos.shape[0] > 1 else 0]
                order = at.argsort(stable=True)
                order = order[(at[order] >= 0) & (at[order] < cache.seen[b])]  # a continuation may stand behind
                held.append((at[order].tolist(), store.keys[row, head, order], store.values[row, head, order]))
        statistics = {
            k: v[b] for k, v in snapshot.items() if isinstance(v, list)
        }  # what is not by row is of the whole batch
        found.append({"numbers": numbers[b], "held": held, "statistics": statistics})
    return found


def assert_alike(together: dict[str, Any], alone: dict[str, Any], words: str) -> None:
    assert together["numbers"].shape == alone["numbers"].shape, words
    if together["numbers"].numel():
        assert (together["numbers"] - alone["numbers"]).abs().max() <= 1e-9, words
    assert together["statistics"] == pytest.approx(alone["statistics"], rel=1e-12), words
    for a, b in zip(together["held"], alone["held"], strict=True):
        assert a[0] == b[0], words
        for x, y in zip(a[1:], b[1:], strict=True):
            assert x.shape == y.shape and (not x.numel() or (x - y).abs().max() <= 1e-9), words


def check(seed: int) -> None:
    case = draw(random.Random(seed))
    everyone = list(range(len(case.rows)))
    words = (
        f"seed {seed}: {case.words} chunk={case.chunk} question={case.question} tails={case.tails} "
        f"tail_tokens={case.tail_tokens} prefill_tokens={case.prefill_tokens} stock={case.stock}"
    )
    together = outcome(case, everyone)
    for i in everyone:
        assert_alike(together[i], outcome(case, [i])[0], f"{words}, row {i}")


@pytest.mark.parametrize("seed", range(SEED, SEED + 100))
def test_a_row_depends_on_its_own_tokens_alone(seed: int) -> None:
    check(seed)


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(1000, 1500))
def test_a_row_depends_on_its_own_tokens_alone_in_500_more_cases(seed: int) -> None:
    check(seed)

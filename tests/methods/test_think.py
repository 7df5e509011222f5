"""ThinK: channels that stay by plain loops over a stock model in float64; answers as with the others set to zero."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from methods.plain import LENGTHS, NAMES, Layer, dot, layers

from kv_lm_eval.cache.make import hand_out, make_cache, make_fan
from kv_lm_eval.cache.quantized import QuantizedStore
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.prefill import feed, prefill
from kv_lm_eval.errors import UserError

RECENT, QUERIES, RATIO = 6, 9, 0.4
THINK = {
    "method": "think",
    "key_channel_ratio": RATIO,
    "residual_length": RECENT,
    "channel_queries": QUERIES,
    "calibration_tokens": 12,
    "code_every": 1,
}
ALONE = {k: v for k, v in THINK.items() if k != "method"}
SNAPKV = {"method": "snapkv", "window_size": 4, "max_capacity_prompt": 16}


@functools.cache
def net(name: str) -> tuple[Any, Any]:
    """In float64, under our attention."""
    built = tiny.build(name)
    facts = wrap(built, tiny.compression(method="full"))
    return built.double(), facts


def after_prompt(name: str, rows: list[list[int]], chunk: int | None = None, **settings: object) -> Any:
    model, facts = net(name)
    compression = tiny.compression(**settings)
    return prefill(model, lambda: make_cache(compression, facts, chunk), rows)[0]


def staying(layer: Layer, kept: list[list[int]] | None = None, ratio: float = RATIO) -> list[list[int]]:
    """Channels that stay in each KV head, in order; kept: tokens whose keys are held, by head."""
    out = []
    for head in layer.kv_heads:
        keys = [layer.keys[head][t] for t in (range(layer.n) if kept is None else kept[head])]
        size, worth = len(keys[0]), []
        for d in range(size):
            asked = [q[d] for own in layer.group(head) for q in layer.queries[own][-QUERIES:]]
            column = [key[d] for key in keys]
            worth.append(dot(asked, asked) / len(asked) * dot(column, column) / len(column))
        ranked = sorted(range(size), key=lambda d: (-worth[d], d))
        out.append(sorted(ranked[: size - int(size * ratio)]))
    return out


def channels(store: Any, row: int = 0) -> list[list[int]]:
    assert isinstance(store, QuantizedStore)
    return store._coded_keys.of_head["channels"][row].tolist()


@pytest.mark.parametrize("ratio", [0.13, 0.4, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_channels_that_the_last_queries_ask_for_stay(name: str, ratio: float) -> None:
    rows = [tiny.tokens(n, seed=n) for n in LENGTHS]
    cache = after_prompt(name, rows, **{**THINK, "key_channel_ratio": ratio})
    for i, row in enumerate(rows):
        segment, at = cache.of_row(i)
        for store, layer in zip(segment.stores, layers(name, tuple(row)), strict=True):
            want = staying(layer, ratio=ratio)
            assert channels(store, at) == want, f"row of {len(row)} tokens"
            keys = torch.tensor(layer.keys, dtype=torch.float64)
            for head, own in enumerate(want):
                gone = [d for d in range(keys.shape[2]) if d not in own]
                keys[head, :-RECENT, gone] = 0.0
            assert torch.allclose(store.keys[at], keys)
            assert torch.allclose(store.values[at], torch.tensor(layer.values, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_a_stock_model_whose_cache_has_zeros_in_these_channels(name: str) -> None:
    model, rows = net(name)[0], [tiny.tokens(n, seed=n) for n in LENGTHS]
    stock = tiny.build(name).double()
    cache = after_prompt(name, rows, **{**THINK, "code_every": 100})
    got = feed(model, cache, [[7]] * 3, keep=1)
    for i, row in enumerate(rows):
        theirs = tf.DynamicCache(config=stock.config)
        with torch.inference_mode():
            stock(input_ids=torch.tensor([row]), **tiny.given(theirs), use_cache=True)
            for own, layer in zip(theirs.layers, layers(name, tuple(row)), strict=True):
                for head, stay in enumerate(staying(layer)):
                    own.keys[0, head, : len(row) - RECENT, [d for d in range(8) if d not in stay]] = 0.0
            want = stock(input_ids=torch.tensor([[7]]), **tiny.given(theirs), use_cache=True).logits[0, -1]
        assert (got[i][-1] - want).abs().max() <= 1e-9


@pytest.mark.parametrize("more", [{}, {"head_budget": "ada"}, {"compress_every": 3}, {"layer_budget": "global"}])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_keeps_loses_channels_and_answers_as_with_zeros(name: str, more: dict[str, object]) -> None:
    """The same method without it, whose keys are set to zero by hand."""
    model, rows = net(name)[0], [tiny.tokens(n, seed=n) for n in LENGTHS]
    thin = after_prompt(name, rows, **SNAPKV, **more, **{**ALONE, "code_every": 100})
    plain = after_prompt(name, rows, **SNAPKV, **more)
    for i, row in enumerate(rows):
        (mine, at), (theirs, there) = thin.of_row(i), plain.of_row(i)
        for store, other, layer in zip(mine.stores, theirs.stores, layers(name, tuple(row)), strict=True):
            kept = [[t for t in own if t >= 0] for own in other.pos[there].expand(len(layer.keys), -1).tolist()]
            held = [[t for t in own if t >= 0] for own in store.pos[at].expand(len(layer.keys), -1).tolist()]
            assert held == kept
            want = staying(layer, kept)
            assert channels(store, at) == want
            for head, (stay, own) in enumerate(zip(want, kept, strict=True)):
                empty = other.length - len(own)
                gone = [d for d in range(8) if d not in stay]
                other.keys[there, head, empty : other.length - RECENT, gone] = 0.0
    for t in range(2):
        a, b = (feed(model, cache, [[7 + t]] * 3, keep=1) for cache in (thin, plain))
        assert all((a[i] - b[i]).abs().max() <= 1e-9 for i in range(3))


def test_fewer_bytes_are_held_and_the_list_of_channels_is_counted() -> None:
    row = tiny.tokens(60)
    cache = after_prompt("llama", [row], **THINK)
    numbers, stay = cache.snapshot(), 8 - int(8 * RATIO)
    old, new = 60 - RECENT, RECENT
    head = (old * (stay + 8) + new * 16) * 8 + stay  # numbers of eight bytes; a byte a channel
    assert numbers["kv_bytes_valid"] == [2 * 2 * head] and numbers["compressed"] == [True]
    assert 2 * 2 * head <= numbers["kv_bytes_allocated"] <= 2 * 2 * (head + 16 * 8)
    store = cache.stores[0]
    held = [*store._coded_keys.tensors, *store._coded_values.tensors, store._exact_keys, store._exact_values]
    assert store.allocated_bytes == sum(t.untyped_storage().nbytes() for t in held)
    assert store._coded_keys.of_pair["keys"].shape == (1, 2, old, stay)
    full = after_prompt("llama", [row], method="full").snapshot()
    assert numbers["overhead_bytes"] == full["overhead_bytes"], "no queries are kept once they have chosen"
    snapkv = after_prompt("llama", [row], **SNAPKV, **ALONE).snapshot()
    assert snapkv["kv_bytes_valid"] == [2 * 2 * ((10 * (stay + 8) + 6 * 16) * 8 + stay)]


def test_pairs_of_an_answer_lose_the_same_channels_as_they_age() -> None:
    model, row = net("llama")[0], tiny.tokens(30)
    cache = after_prompt("llama", [row], **{**THINK, "code_every": 3})
    before = [channels(store) for store in cache.stores]
    for t in range(7):
        feed(model, cache, [[t + 1]], keep=1)
        old = 24 + (30 + t + 1) // 3 * 3 - 30
        for store, own in zip(cache.stores, before, strict=True):
            assert channels(store) == own and store.coded == [[old, old]]
            for head, stay in enumerate(own):
                gone = [d for d in range(8) if d not in stay]
                zeros = (store.keys[0, head][:, gone] == 0).all(1).tolist()
                assert zeros == [True] * old + [False] * (31 + t - old)


def test_a_prompt_that_is_too_short_is_whole_until_enough_was_seen_and_chunks_change_nothing() -> None:
    model, facts = net("llama")
    row = tiny.tokens(40)
    cache = after_prompt("llama", [row[:10]], **THINK)
    assert cache.stores[0].coded == [[0, 0]] and cache.snapshot()["compressed"] == [False]
    waiting = cache.snapshot()["overhead_bytes"]
    assert waiting == 2 * (10 * 4 + 4 * QUERIES * 8 * 8), "positions, and the queries that are to choose"
    for t in range(10, 12):
        feed(model, cache, [[row[t]]], keep=1)
    assert cache.stores[0].coded == [[6, 6]]
    of_twelve = [staying(layer) for layer in layers("llama", tuple(row[:12]))]
    assert channels(cache.stores[0]) == of_twelve[0], "later layers have been fed through what was whole until now"
    whole = after_prompt("llama", [row], **THINK)
    for chunk in (1, 5, 7, 33):
        parts = after_prompt("llama", [row], chunk, **THINK)
        for a, b in zip(parts.stores, whole.stores, strict=True):
            assert channels(a) == channels(b) and torch.allclose(a.keys, b.keys)
    caches = [make_cache(tiny.compression(**s), facts, 7) for s in (THINK, {**SNAPKV, **ALONE})]
    fan = make_fan(tiny.compression(method="full"), caches, 1)
    prefill(model, lambda: fan, [row])
    hand_out(fan, caches)
    for a, b in zip(caches[0].stores, whole.stores, strict=True):
        assert channels(a) == channels(b) and torch.allclose(a.keys, b.keys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_chooses_by_its_own_numbers_in_a_wide_format(name: str, dtype: torch.dtype) -> None:
    model = tiny.build(name).to(dtype)
    facts = wrap(model, tiny.compression(**THINK))
    seen: list[tuple[Any, Any, Any]] = []
    compression = tiny.compression(**THINK)
    kind, of_queries = type(compression.storage), type(compression.storage).of_queries

    def noted(self: Any, *given: torch.Tensor) -> Any:
        seen.append(given)
        return of_queries(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "of_queries", noted)
        cache, logits = prefill(
            model, lambda: make_cache(compression, facts), [tiny.tokens(40), tiny.tokens(30, seed=1)]
        )
    assert all(own.isfinite().all() for own in logits.values())
    for segment, calls in zip(cache.segments, (seen[::2], seen[1::2]), strict=True):
        for store, (keys, real, queries) in zip(segment.stores, calls, strict=True):
            assert keys.dtype == queries.dtype == dtype and queries.shape[2] == QUERIES and real.all()
            as_lists = Layer(queries[0].tolist(), keys[0].tolist(), [], [], torch.zeros(0), [])
            assert channels(store) == staying(as_lists)
            assert store._coded_keys.of_pair["keys"].dtype == store.keys.dtype == dtype


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({**THINK, "key_channel_ratio": 1.0}, ["key_channel_ratio=1", "(0, 1)"]),
        ({**THINK, "key_channel_ratio": 0}, ["key_channel_ratio=0", "(0, 1)"]),
        ({**THINK, "channel_queries": 0}, ["channel_queries=0"]),
        ({**THINK, "nbits": 4}, ["nbits=4", "no effect", "key_channel_ratio=0.4", "kivi"]),
        ({**SNAPKV, "nbits": 4, "key_channel_ratio": 0.4}, ["key_channel_ratio=0.4", "nbits=4", "think"]),
        ({**SNAPKV, "kv_cache_dtype": "fp8", "key_channel_ratio": 0.4}, ["key_channel_ratio=0.4", "fp8"]),
        ({"method": "think", "kv_cache_dtype": "auto"}, ["method=think", "method=full"]),
        ({"method": "streaming_ring", "window_size": 8, "key_channel_ratio": 0.4}, ["key_channel_ratio=0.4", "ring"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_reason(chosen: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        tiny.compression(**chosen)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_share_that_removes_no_channel_is_refused_before_any_work() -> None:
    model = tiny.build("llama")
    with pytest.raises(UserError, match=r"key_channel_ratio=0.1 of 8 channels is none.*at least 1/8"):
        wrap(model, tiny.compression(**{**THINK, "key_channel_ratio": 0.1}))

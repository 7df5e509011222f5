"""How many slots stay: exactly as many as asked for, whatever the batch."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_lm_eval.methods.budget import Ratio

ONLINE = {  # those that share nothing out: every head and layer keeps the budget
    name: {k: v for k, v in tiny.free(name, 8).items() if k not in ("max_capacity_prompt", "cache_size")}
    for name in tiny.methods(lambda cls: tiny.chooses(cls) and not {"layer_budget", "head_budget"} & set(cls.presets))
}
every_method = pytest.mark.parametrize("method", ONLINE)
everywhere = pytest.mark.parametrize(("name", "method"), tiny.cases(ONLINE))


@pytest.mark.parametrize(
    ("ratio", "seen", "keep"),
    [(0.9, 100, 90), (0.1, 10, 1), (0.7, 10, 7), (0.3, 10, 3), (0.29, 100, 29), (0.5, 3, 1), (1.0, 7, 7), (1e-9, 5, 1)],
)
def test_a_share_is_exact_and_rounded_down_to_at_least_one_slot(ratio: float, seen: int, keep: int) -> None:
    assert tiny.compression(method="knorm", keep_ratio=ratio).keep([seen], [seen], 0, [0]) == [keep]


@given(st.integers(1, 1000), st.integers(1, 100_000))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_share_in_thousandths_is_the_rational_number_that_was_written(thousandths: int, seen: int) -> None:
    expected = floor(Fraction(thousandths, 1000) * seen)
    assert Ratio(thousandths / 1000).asked([seen], [seen], 0) == [expected]
    removed = tiny.compression(method="knorm", compression_ratio=1 - thousandths / 1000)
    assert removed.budget.asked([seen], [seen], 0) == [expected]


@given(st.integers(0, 999), st.integers(1, 100_000))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_the_references_share_is_kvpresss_in_binary_fractions(thousandths: int, seen: int) -> None:
    ratio = thousandths / 1000
    got = tiny.compression(method="knorm", compression_ratio=ratio, rounding="reference").keep([seen], [seen], 0, [0])
    assert got == [max(1, int(seen * (1 - ratio)))]


@everywhere
def test_a_budget_over_the_length_changes_nothing(name: str, method: str) -> None:
    pair = tiny.pair(name)
    rows = [tiny.tokens(40, seed=1), tiny.tokens(23, seed=2)]
    full, cut = pair.cache(method="full"), pair.cache(**ONLINE[method], max_capacity_prompt=46, compress_every=1)
    for part, starts in [(slice(0, -6), None), *((slice(i, i + 1 or None), True) for i in range(-6, 0))]:
        at = [range(len(r))[part].start for r in rows] if starts else None
        a = tiny.forward(pair.model, full, [r[part] for r in rows], starts=at)
        b = tiny.forward(pair.model, cut, [r[part] for r in rows], starts=at)
        assert (a[0] - b[0]).abs().max() <= 1e-5 and (a[1, -1] - b[1, -1]).abs().max() <= 1e-5
    assert cut.snapshot()["compressed"] == [False, False] or name in ("mistral_sliding", "gemma3")


@everywhere
@pytest.mark.parametrize("every", [1, 3])
def test_layers_hold_the_budget_and_the_tokens_since_the_last_cut(name: str, method: str, every: int) -> None:
    pair, budget = tiny.pair(name), 12
    cache = pair.cache(**ONLINE[method], max_capacity_prompt=budget, compress_every=every)
    lengths = [50, 31, 9]
    rows = [tiny.tokens(n + 10, seed=n) for n in lengths]
    layers = [i for i in range(pair.facts.num_layers) if pair.facts.compressible(i)]
    tiny.forward(pair.model, cache, [r[:n] for r, n in zip(rows, lengths, strict=True)])
    for step in range(11):
        for layer in layers:
            for row, n in enumerate(lengths):
                counts = {len(head) for head in tiny.kept(cache, layer, row)}
                last_cut = step - step % every
                after_cut = budget if n + last_cut > budget else n + last_cut
                assert counts == {after_cut + step % every}, f"row of {n} tokens, {step} decoded"
                assert cache.held[layer][row] == after_cut + step % every
        if step < 10:
            part = [r[n + step : n + step + 1] for r, n in zip(rows, lengths, strict=True)]
            tiny.forward(pair.model, cache, part, starts=[n + step for n in lengths])
    for segment in cache.segments:
        segment.peaks = [0] * segment.rows
    tiny.forward(pair.model, cache, [[1], [1], [1]], starts=cache.seen)
    if len(layers) == pair.facts.num_layers:
        assert max(cache.peaks) <= budget + every


@every_method
@pytest.mark.parametrize("ratio", [{"keep_ratio": 0.5}, {"compression_ratio": 0.5}])
def test_every_row_of_a_batch_keeps_its_own_share(method: str, ratio: dict[str, float]) -> None:
    pair = tiny.pair("llama")
    cache = pair.cache(**ONLINE[method], **ratio)
    lengths = [41, 30, 11]
    tiny.forward(pair.model, cache, [tiny.tokens(n) for n in lengths])
    for layer in range(2):
        assert [len(tiny.kept(cache, layer, b)[0]) for b in range(3)] == [20, 15, 5]
    assert cache.snapshot()["kept_fraction"] == [20 / 41, 15 / 30, 5 / 11]
    assert cache.snapshot()["compressed"] == [True, True, True]


def test_snapkv_keeps_its_window_and_streaming_llm_its_sinks_while_decoding() -> None:
    pair = tiny.pair("llama")
    snap = pair.cache(**ONLINE["snapkv"], max_capacity_prompt=10, compress_every=1)
    sink = pair.cache(**ONLINE["streaming_llm"], max_capacity_prompt=10)
    for cache in (snap, sink):
        tiny.forward(pair.model, cache, [tiny.tokens(30)])
    for seen in range(31, 40):
        for cache in (snap, sink):
            tiny.forward(pair.model, cache, [[seen]], starts=[seen - 1])
        for layer in range(2):
            assert all(set(range(seen - 4, seen)) <= set(head) for head in tiny.kept(snap, layer))
            assert tiny.kept(sink, layer) == [[0, 1, 2, 3, *range(seen - 6, seen)]]


def test_a_share_smaller_than_the_window_still_keeps_the_window() -> None:
    pair = tiny.pair("llama")
    cache = pair.cache(method="snapkv", window_size=8, keep_ratio=0.1)
    tiny.forward(pair.model, cache, [tiny.tokens(40), tiny.tokens(5)])
    assert tiny.kept(cache, 0, 0) == [list(range(32, 40))] * 2
    assert tiny.kept(cache, 0, 1) == [list(range(5))] * 2


@every_method
def test_methods_that_cut_only_after_the_prefill_grow_by_one_slot_a_token(method: str) -> None:
    pair = tiny.pair("llama")
    cache = pair.cache(**ONLINE[method], max_capacity_prompt=10, compress_every=0)
    tiny.forward(pair.model, cache, [tiny.tokens(30)])
    for step in range(5):
        assert cache.held == [[10 + step]] * 2
        tiny.forward(pair.model, cache, [[5]], starts=[30 + step])


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_same_number_of_slots_and_finite_logits(method: str, dtype: torch.dtype) -> None:
    model = tiny.build("llama").to(dtype)
    pair = tiny.Pair(model, model, tiny.wrap(model, tiny.compression(method="streaming_llm", window_size=8)))
    cache = pair.cache(**ONLINE[method], max_capacity_prompt=10, compress_every=1)
    tiny.forward(model, cache, [tiny.tokens(40), tiny.tokens(20)])
    for step in range(3):
        assert tiny.forward(model, cache, [[1], [2]], starts=[40 + step, 20 + step]).isfinite().all()
        assert cache.held == [[10, 10]] * 2
    assert all(store.keys.dtype == dtype for store in cache.stores)


def test_nothing_is_left_of_one_prompt_in_the_next() -> None:
    pair = tiny.pair("llama")
    settings = {**ONLINE["h2o"], "max_capacity_prompt": 10}
    first, again = pair.cache(**settings), pair.cache(**settings)
    tiny.forward(pair.model, first, [tiny.tokens(50, seed=1)])
    first.reset()
    for cache in (first, again):
        tiny.forward(pair.model, cache, [tiny.tokens(40, seed=2)])
    assert all(
        torch.equal(a.keys, b.keys) and torch.equal(a.pos, b.pos)
        for a, b in zip(first.stores, again.stores, strict=True)
    )

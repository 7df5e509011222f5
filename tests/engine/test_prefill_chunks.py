"""Prompts in chunks: the same as one forward; with prefill_evict, cut after every chunk, rows apart from each other."""

from __future__ import annotations

import pytest
import tiny
import torch

from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.config import parse
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.prefill import chunks, feed_beginning
from kv_lm_eval.engine.question import prefill_before_question
from kv_lm_eval.errors import UserError

METHODS: dict[str, dict[str, object]] = {
    **{name: tiny.example(name, 12) for name in tiny.methods(lambda cls: cls.uses_cache)},
    "h2o once": {"method": "h2o", "max_capacity_prompt": 12, "compress_every": 0},
    "knorm": {"method": "knorm", "keep_ratio": 0.4},
    "lagkv": {"method": "lagkv", "max_capacity_prompt": 24, "n_sink": 2, "lag_size": 5},
    "random": {"method": "random", "max_capacity_prompt": 9},
    "quantized": {"method": "quantized", "nbits": 8, "group_size": 8},
}
LENGTHS = (43, 22, 5)
NEEDS_ROPE = {"streaming_llm", "streaming_ring", "expected_attention"}


def new_cache(pair: tiny.Pair, settings: dict[str, object], chunk: int | None = None, evicts: bool = False):
    return make_cache(tiny.compression(**settings), pair.facts, chunk, evicts)


@pytest.mark.parametrize("chunk", [1, 7, 16, 42])
@pytest.mark.parametrize("method", METHODS)
def test_chunks_keep_what_one_forward_keeps(method: str, chunk: int) -> None:
    """Left-padded rows of mixed lengths: some rows are nothing but padding in some chunks."""
    for name in ("llama", "gpt_neox"):
        same_as_one_forward(name, METHODS[method], chunk)


@pytest.mark.parametrize("name", ["mistral_sliding", "gemma3", "gemma2", "gpt2"])
@pytest.mark.parametrize("method", ["snapkv", "h2o", "tova"])
def test_chunks_on_layers_with_windows_of_their_own(name: str, method: str) -> None:
    same_as_one_forward(name, METHODS[method], 9)


def same_as_one_forward(name: str, settings: dict[str, object], chunk: int) -> None:
    pair, rows = tiny.pair(name), [tiny.tokens(n, seed=n) for n in LENGTHS]
    with torch.inference_mode():
        whole, expected = tiny.prefill(pair.model, lambda: new_cache(pair, settings), rows)
        cut_up, got = tiny.prefill(pair.model, lambda: new_cache(pair, settings, chunk), rows)
    assert (got - expected).abs().max() <= 1e-5
    assert (cut_up.seen, cut_up.held, cut_up.peaks) == (
        whole.seen,
        whole.held,
        whole.peaks,
    )
    assert [s.decoded for s in (*cut_up.segments, *whole.segments)] == [0] * 2 * len(rows)
    for layer in range(pair.facts.num_layers):
        for row in range(len(rows)):
            assert tiny.kept(cut_up, layer, row) == tiny.kept(whole, layer, row)
    for token in (3, 4, 5):  # and goes on in the same way, with the cuts to come
        step = [[token]] * len(rows)
        got, expected = (tiny.forward(pair.model, c, step, list(c.seen))[:, -1] for c in (cut_up, whole))
        assert (got - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("method", ["snapkv", "h2o", "streaming_ring", "full"])
@pytest.mark.parametrize("rows_of", [(43, 22, 5), (30,), (8, 9)])
def test_generate_goes_on_from_the_last_chunk(method: str, rows_of: tuple[int, ...]) -> None:
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in rows_of]
    ids, mask, _ = tiny.left_padded(rows)
    out, steps = [], []
    for chunk in (None, 8):
        cache = new_cache(pair, METHODS[method], chunk)
        feed_beginning(pair.model, cache, rows)
        assert cache.batch == (0 if chunk is None else len(rows))
        cache.keep_history(True)
        out.append(
            pair.model.generate(
                ids, attention_mask=mask, **tiny.given(cache), max_new_tokens=9, do_sample=False, pad_token_id=0
            )
        )
        assert cache.prefill_end is not None
        assert cache.prefill_end["seen"] == list(rows_of)
        steps.append(len(cache.segments[0].history))
    assert torch.equal(out[0], out[1])
    assert steps[0] == steps[1] == out[0].shape[1] - ids.shape[1]


def test_generate_with_beams_goes_on_from_the_last_chunk() -> None:
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in (30, 14)]
    ids, mask, _ = tiny.left_padded(rows)
    more = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    whole, cut_up = new_cache(pair, METHODS["snapkv"]), new_cache(pair, METHODS["snapkv"], 8)
    feed_beginning(pair.model, cut_up, rows)
    cut_up.batch_repeat_interleave(3)
    expected = pair.model.generate(ids, **tiny.given(whole), **more)
    assert torch.equal(pair.model.generate(ids, **tiny.given(cut_up), **more), expected)


@pytest.mark.parametrize("method", ["full", "snapkv", "tova"])
def test_choices_and_questions_are_the_same_in_chunks(method: str) -> None:
    pair, contexts = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in LENGTHS]
    groups = [[tiny.tokens(n, seed=n) for n in lengths] for lengths in ((1, 7), (4, 2, 6), (3,))]
    scores, questions = [], []
    for chunk in (None, 6):
        make = lambda chunk=chunk: new_cache(pair, METHODS[method], chunk)  # noqa: E731
        scores.append(score_continuations(pair.model, make, contexts, groups, 2)[0])
        single = [g[:1] for g in groups]  # full: one forward over context and continuation
        scores[-1] += score_continuations(pair.model, make, contexts, single, 1)[0]
        questions.append(prefill_before_question(pair.model, make, contexts, [4, 4, 4]))
    for got, expected in zip(sum(scores[1], []), sum(scores[0], []), strict=True):
        assert got == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert questions[0].held == questions[1].held
    assert [tiny.kept(questions[0], i) for i in (0, 1)] == [tiny.kept(questions[1], i) for i in (0, 1)]


# --- cuts between chunks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("chunk", [1, 6, 13])
def test_sinks_and_window_evicted_between_chunks_are_those_of_a_masked_full_forward(name: str, chunk: int) -> None:
    """The stock model, each query of a chunk hidden from what was evicted before the chunk; true positions."""
    pair, row, sinks, window = tiny.pair(name), tiny.tokens(45), 2, 9
    settings = {"method": "streaming_llm", "n_sink": sinks, "window_size": window, "positions": "absolute"}
    with torch.inference_mode():
        cache, got = tiny.prefill(pair.model, lambda: new_cache(pair, settings, chunk, True), [row])
        first = (len(row) - 1) % chunk + 1
        begins = [0, *range(first, len(row), chunk)]
        visible = torch.zeros(len(row), len(row), dtype=torch.bool)
        for begin, end in zip(begins, [*begins[1:], len(row)], strict=True):
            for query in range(begin, end):
                visible[query, :sinks] = visible[query, max(0, begin - window) : query + 1] = True
        visible &= torch.ones_like(visible).tril()
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
        expected = pair.stock(torch.tensor([row]), attention_mask=mask, use_cache=False).logits[:, -1]
    assert (got - expected).abs().max() <= 1e-5
    assert tiny.kept(cache, 0) == [[*range(sinks), *range(len(row) - window, len(row))]]
    assert cache.segments[0].decoded == 0
    assert max(cache.peaks) == min(len(row), max(chunk, sinks + window + chunk))


@pytest.mark.parametrize("method", ["h2o", "h2o once", "tova", "random", "streaming_llm", "streaming_ring", "keydiff"])
@pytest.mark.parametrize("chunk", [5, 16])
def test_rows_evicted_between_chunks_do_not_depend_on_their_neighbours(method: str, chunk: int) -> None:
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in LENGTHS]
    with torch.inference_mode():
        batch, together = tiny.prefill(pair.model, lambda: new_cache(pair, METHODS[method], chunk, True), rows)
        for b, row in enumerate(rows):
            single, alone = tiny.prefill(pair.model, lambda: new_cache(pair, METHODS[method], chunk, True), [row])
            assert (together[b] - alone[0]).abs().max() <= 1e-5
            assert [held[b] for held in batch.held] == [held[0] for held in single.held]
            assert batch.peaks[b] == single.peaks[0]
            for layer in range(pair.facts.num_layers):
                heads = [tiny.kept(cache, layer, i) for cache, i in ((batch, b), (single, 0))]
                most = max(map(len, heads))
                assert heads[0] * (most // len(heads[0])) == heads[1] * (most // len(heads[1]))


def test_h2o_evicted_at_every_token_is_the_papers_algorithm_token_by_token() -> None:
    """chunk=1: attention sums are carried, and the cut follows each prompt token."""
    pair, row, budget = tiny.pair("llama"), tiny.tokens(30), 8
    settings = {"method": "h2o", "max_capacity_prompt": budget}
    with torch.inference_mode():
        cache, got = tiny.prefill(pair.model, lambda: new_cache(pair, settings, 1, True), [row])
    stepwise = pair.cache(**settings)
    for t, token in enumerate(row):
        expected = tiny.forward(pair.model, stepwise, [[token]], [t])[:, -1]
    assert (got - expected).abs().max() <= 1e-5
    assert [tiny.kept(cache, i) for i in (0, 1)] == [tiny.kept(stepwise, i) for i in (0, 1)]


def test_memory_stays_the_same_whatever_the_length() -> None:
    pair, settings = tiny.pair("llama"), METHODS["streaming_llm"]
    held = []
    for length in (100, 400):
        with torch.inference_mode():
            cache, _ = tiny.prefill(pair.model, lambda: new_cache(pair, settings, 10, True), [tiny.tokens(length)])
        held.append((cache.peaks, [store.allocated_bytes for store in cache.stores]))
    assert held[0] == held[1]
    assert held[0][0] == [3 + 9 + 10]


# --- settings -------------------------------------------------------------------------------------------------------


def test_chunks_are_counted_from_the_end_and_only_for_prompts() -> None:
    pair = tiny.pair("llama")
    cache = new_cache(pair, METHODS["full"], 3)
    rows = [[1, 2, 3, 4, 5, 6, 7], [8, 9], []]
    assert chunks(cache, rows) == [[[1], [], []], [[2, 3, 4], [], []], [[5, 6, 7], [8, 9], []]]
    cache.mode = "decode"
    assert chunks(cache, rows) == [rows]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "snapkv", "max_capacity_prompt": 64, "prefill_evict": 32}, "prefill_chunk=32 for the same answers"),
        ({"method": "lagkv", "max_capacity_prompt": 400, "prefill_evict": 32}, "is defined by its end"),
        ({"method": "full", "prefill_evict": 32}, "evicts nothing"),
        ({"method": "no_cache", "prefill_chunk": 32}, "has no cache"),
        ({"method": "full", "prefill_chunk": 0}, "at least 1 token"),
        ({"method": "tova", "max_capacity_prompt": 9, "prefill_chunk": 4, "prefill_evict": 4}, "both cut the prompt"),
    ],
    ids=str,
)
def test_settings_without_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(dict(settings))


@pytest.mark.parametrize("method", ["window", "tova", "h2o", "random", "keydiff", "knorm"])
def test_online_methods_may_evict_in_the_prefill(method: str) -> None:
    assert parse({"method": method, "max_capacity_prompt": 32, "prefill_evict": 16})[1].prefill_evict == 16

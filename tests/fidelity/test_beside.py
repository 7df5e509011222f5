"""Teacher and student in step give the numbers of two full forwards of their own, whatever the forwards' lengths."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import tiny
import torch
from fidelity import references
from fidelity.references import PREFIX, pair64

from kv_lm_eval.engine import fidelity, streaming
from kv_lm_eval.metrics import divergence

METHODS = {
    "snapkv": {"method": "snapkv", "window_size": 4, "kernel_size": 3},
    "knorm": {"method": "knorm"},
    "keydiff": {"method": "keydiff"},
    "random": {"method": "random"},
    "adakv": {"method": "adakv", "window_size": 4},
    "pyramidkv": {"method": "pyramidkv", "window_size": 4},
    "tova": {"method": "tova", "compress_every": 0},
    "expected_attention": {"method": "expected_attention"},
}


def beside(pair: tiny.Pair, documents: list[list[int]], every: int = 64, prefill: int = 0, **settings: object):
    return fidelity.score_beside(
        pair.model, lambda: pair.cache(**settings), documents, fidelity.Stream(PREFIX, every, prefill_tokens=prefill)
    )[2]


@pytest.mark.parametrize("seed", range(12))
def test_random_settings_equal_full_forwards_with_what_was_evicted_hidden(seed: int) -> None:
    draw = random.Random(seed)
    pair = pair64(draw.choice(["llama", "qwen3", "gpt_neox"]))
    name = draw.choice(sorted(METHODS))
    budget, cut = draw.randint(6, 24), draw.randint(25, 60)
    settings = {**METHODS[name], "max_capacity_prompt": budget}
    document = tiny.tokens(cut + draw.randint(1, 50), seed=seed)
    (got,) = beside(pair, [document], every=512, prefill=cut, **settings)
    row = [PREFIX, *document[:-1]]
    teacher = references.stock_logits(pair.stock, row)
    student = references.cut_once(pair, row, cut, **settings)
    assert references.worst(got, references.loops(teacher, student, document)) < 1e-8, (name, budget, cut)
    assert got.kl[:cut].max() < 1e-12 and got.kl[cut:].max() > 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_every_cut_of_sinks_and_a_window_is_that_of_a_mask_by_plain_rules(seed: int) -> None:
    draw = random.Random(seed)
    pair = pair64("llama")
    n_sink, window, every = draw.randint(0, 4), draw.randint(3, 12), draw.randint(1, 9)
    documents = [tiny.tokens(draw.randint(1, 90), seed=10 * seed + i) for i in range(3)]
    settings = {"method": "streaming_llm", "n_sink": n_sink, "window_size": window, "positions": "absolute"}
    found = beside(pair, documents, every=every, **settings)
    for document, got in zip(documents, found, strict=True):
        row = [PREFIX, *document[:-1]]
        student = references.seen(pair.stock, row, references.window_of(len(row), n_sink, window, every))
        wanted = references.loops(references.stock_logits(pair.stock, row), student, document)
        assert references.worst(got, wanted) < 1e-8


@pytest.mark.parametrize("name", tiny.CORE)
@pytest.mark.parametrize("settings", [{"method": "h2o"}, {"method": "knorm"}, {"method": "quantized", "nbits": 2}])
def test_a_document_in_a_batch_has_the_numbers_it_has_alone(name: str, settings: dict[str, object]) -> None:
    pair = pair64(name)
    if settings["method"] != "quantized":
        settings = {**settings, "max_capacity_prompt": 14}
    documents = [tiny.tokens(n, seed=n) for n in (61, 30, 1)]
    together = beside(pair, documents, 8, **settings)
    for document, got in zip(documents, together, strict=True):
        (alone,) = beside(pair, [document], 8, **settings)
        assert abs(got.kl - alone.kl).max() < 1e-9
        assert abs(got.base_log_probs - alone.base_log_probs).max() < 1e-9
        assert (got.same_top == alone.same_top).all()


@pytest.mark.parametrize("name", tiny.CORE)
def test_the_full_cache_is_at_no_distance_from_itself_whatever_its_forwards(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = tiny.pair(name)  # float32
    documents = [tiny.tokens(130, seed=1), tiny.tokens(40, seed=2)]
    monkeypatch.setattr(streaming, "MIN_CHUNK", 29)
    monkeypatch.setattr(streaming, "LOGIT_ELEMENTS", 29)
    for got in beside(pair, documents, method="full"):
        assert got.kl.max() < 1e-9 and got.same_top.all()
    monkeypatch.setattr(fidelity, "FLOOR_FORWARD", 17)
    floor, coarse = fidelity.noise_floor(pair.model, pair.facts, PREFIX, documents[0], [None, torch.bfloat16])
    assert len(floor) == len(coarse) == 130 and 0 < floor.kl.max() < 1e-9
    assert coarse.kl.mean() > 1e3 * floor.kl.mean()


def test_the_teachers_numbers_are_those_of_a_run_of_its_own() -> None:
    pair, document = tiny.pair("llama"), tiny.tokens(120)
    (alone,), _ = streaming.score_documents(
        pair.model, lambda: pair.cache(method="full"), [document], streaming.Stream(PREFIX, 64)
    )
    (got,) = beside(pair, [document], 3, method="knorm", max_capacity_prompt=14)
    assert (got.base_log_probs == alone.log_probs.cpu().numpy()).all()
    (scored,), _ = streaming.score_documents(
        pair.model, lambda: pair.cache(method="knorm", max_capacity_prompt=14), [document], streaming.Stream(PREFIX, 3)
    )
    assert abs(got.log_probs - scored.log_probs.cpu().numpy()).max() < 1e-6


def test_logits_that_were_read_are_let_go_of() -> None:
    """Two blocks of each stream at most, where one of them crosses the other's end."""
    pair, document = tiny.pair("llama"), tiny.tokens(300)
    row = [PREFIX, *document[:-1]]
    stream = fidelity.Ahead(streaming.forwards(pair.model, pair.cache(method="full"), [row], most=16), 1)
    for start in range(0, 299, 7):
        got = stream.take(0, start, min(start + 7, 300))
        assert len(got) == min(7, 300 - start)
        assert sum(len(x) for _, x in stream._held[0]) <= 32


def test_logits_of_a_large_vocabulary_are_held_a_block_at_a_time() -> None:
    """8,192 tokens of 150,000 words: what both runs hold at any time, and what is made to compare them, by tracking."""
    vocab, tokens = 150_000, 8192
    block = max(streaming.MIN_CHUNK, streaming.LOGIT_ELEMENTS // vocab)
    made: list[int] = []

    def blocks(size: int) -> Iterator[tuple[list[int], dict[int, torch.Tensor]]]:
        for at in range(0, tokens, size):
            made.append(min(size, tokens - at))
            yield [at], {0: torch.zeros(1, 1).expand(made[-1], vocab)}  # no memory of their own

    ahead, most = fidelity.Ahead(blocks(block), 1), 0
    for done in range(0, tokens, 64):  # a method that is cut every 64 tokens
        taken = ahead.take(0, done, done + 64)
        assert taken.shape == (64, vocab)
        most = max(most, sum(len(logits) for _, logits in ahead._held[0]))
    assert sum(made) == tokens and most <= block + 64
    assert (block + 64) * vocab <= 1.1 * streaming.LOGIT_ELEMENTS
    assert divergence.BLOCK_ELEMENTS // vocab * vocab <= 2**19  # and of these, what is compared at a time

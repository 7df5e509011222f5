"""Cuts come at the schedule's ticks, in whatever forwards the tokens come: as if they came one at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import tiny
import torch

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.engine import streaming
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.engine.streaming import Stream, score_documents

COMPRESSION = tiny.compression(method="snapkv", window_size=4, max_capacity_prompt=16, compress_every=5)


@pytest.fixture(scope="module")
def made() -> tuple[Any, partial[CompressedCache]]:
    model = tiny.build("llama")
    facts = wrap(model, FULL)
    return model.double(), partial(make_cache, COMPRESSION, facts)


def held(cache: CompressedCache) -> list[list[list[int]]]:
    return [tiny.kept(cache, layer) for layer in range(2)]


@pytest.mark.parametrize("length", [15, 16, 17, 19, 20, 21, 24, 43])
@pytest.mark.parametrize("most", [4096, 13])  # tokens of one forward at most
def test_documents_are_cut_as_token_by_token(
    made: tuple[Any, partial[CompressedCache]], monkeypatch: pytest.MonkeyPatch, length: int, most: int
) -> None:
    model, new_cache = made
    monkeypatch.setattr(streaming, "MIN_CHUNK", 1)
    monkeypatch.setattr(streaming, "HOLD_TOKENS", most)
    (got,), cache = score_documents(model, new_cache, [tiny.tokens(length)], Stream(1, 5))
    monkeypatch.setattr(Segment, "until_due", lambda *_: 1)
    (expected,), one_by_one = score_documents(model, new_cache, [tiny.tokens(length)], Stream(1, 5))
    assert held(cache) == held(one_by_one)
    assert torch.allclose(got.log_probs, expected.log_probs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tail", range(1, 30, 3))
def test_choices_are_cut_as_token_by_token(
    made: tuple[Any, partial[CompressedCache]], monkeypatch: pytest.MonkeyPatch, tail: int
) -> None:
    model, new_cache = made
    contexts, groups = [tiny.tokens(30)[: tail + 1]], [[tiny.tokens(7, seed=1), tiny.tokens(3, seed=2)]]
    (got,), cache = score_continuations(model, new_cache, contexts, groups, tail)
    monkeypatch.setattr(Segment, "until_due", lambda *_: 1)
    (expected,), one_by_one = score_continuations(model, new_cache, contexts, groups, tail)
    assert held(cache) == held(one_by_one)
    assert [s for s, _ in got] == pytest.approx([s for s, _ in expected], abs=1e-10)

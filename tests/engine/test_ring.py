"""streaming_ring is streaming_llm with a cut after every token, in storage that never moves or grows."""

from __future__ import annotations

import pytest
import tiny
import torch

from kv_lm_eval.cache.ring import RingStore
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError

BUDGET = {"n_sink": 3, "window_size": 9}
MODELS = [("llama", {}), ("gpt_neox", {}), ("qwen3", {}), ("gemma3", {}), ("gpt2", {"positions": "absolute"})]


@pytest.mark.parametrize("lengths", [(30,), (40, 17, 3), (12, 2, 9), (3, 13)])
@pytest.mark.parametrize(("name", "more"), MODELS)
def test_every_step_is_that_of_streaming_llm(name: str, more: dict[str, str], lengths: tuple[int, ...]) -> None:
    """The other side is proved against unrotated keys in test_streaming_llm.py."""
    pair, steps = tiny.pair(name), 40
    ring, other = (pair.cache(method=m, **BUDGET, **more) for m in ("streaming_ring", "streaming_llm"))
    rows = [tiny.tokens(n + steps, seed=n) for n in lengths]
    storage = set()
    for step in range(steps):
        fed = [r[:n] if step == 0 else r[n + step - 1 : n + step] for r, n in zip(rows, lengths, strict=True)]
        starts = [0 if step == 0 else n + step - 1 for n in lengths]
        got, expected = (tiny.forward(pair.model, c, fed, starts)[:, -1] for c in (ring, other))
        assert (got - expected).abs().max() <= 1e-5, f"step {step}"
        assert (ring.held, ring.peaks) == (other.held, other.peaks)
        if step > 12:
            stores = [segment.stores[-1] for segment in ring.segments]
            storage.add(tuple((store.keys.data_ptr(), tuple(store.keys.shape)) for store in stores))
    assert all(isinstance(segment.stores[-1], RingStore) for segment in ring.segments)
    assert len(storage) == 1, "the ring stays where it is"
    assert {segment.stores[-1].keys.shape[2] for segment in ring.segments} == {3 + 9 + 1}


@pytest.mark.parametrize("tail", [1, 4])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_continuations_forked_from_a_ring_score_as_under_streaming_llm(name: str, tail: int) -> None:
    pair = tiny.pair(name)
    contexts = [tiny.tokens(n, seed=n) for n in (33, 14, 5)]
    groups = [[tiny.tokens(n, seed=n) for n in lengths] for lengths in ((1, 7), (4, 2, 6), (3,))]
    got, expected = (
        score_continuations(pair.model, lambda m=m: pair.cache(method=m, **BUDGET), contexts, groups, tail)[0]
        for m in ("streaming_ring", "streaming_llm")
    )
    for a, b in zip(sum(got, []), sum(expected, []), strict=True):
        assert abs(a[0] - b[0]) <= 1e-4
        assert a[1] == b[1]


def test_documents_are_streamed_as_under_streaming_llm() -> None:
    pair, document = tiny.pair("llama"), tiny.tokens(120)
    got, expected = (
        score_documents(pair.model, lambda m=m: pair.cache(method=m, **BUDGET), [document], Stream(5, 1))[0][0]
        for m in ("streaming_ring", "streaming_llm")
    )
    assert torch.equal(got.log_probs, expected.log_probs)


def test_rows_move_with_their_rings() -> None:
    """Beams and forks: a row that is picked twice goes on twice."""
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in (25, 20)]
    cache = pair.cache(method="streaming_ring", **BUDGET)
    tiny.forward(pair.model, cache, rows)
    tiny.forward(pair.model, cache, [[7], [8]], [25, 20])
    fork = cache.select([1, 0, 1])
    expected = tiny.forward(pair.model, cache, [[9], [9]], [26, 21])[:, -1]
    got = tiny.forward(pair.model, fork, [[9], [9], [9]], [21, 26, 21])[:, -1]
    assert (got - expected[[1, 0, 1]]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"window_size": 8, "compress_every": 4},
        {"keep_ratio": 0.5},
        {"window_size": 8, "skip_layers": [0]},
        {"max_capacity_prompt": 16, "layer_budget": "pyramid"},
    ],
    ids=str,
)
def test_what_a_ring_cannot_do_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match="streaming_llm takes everything else"):
        tiny.compression(method="streaming_ring", **settings)

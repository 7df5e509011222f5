"""Cuts of a few pairs hide them in their places: the pairs that stay are the same, and so is the memory."""

from __future__ import annotations

import hypothesis
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_lm_eval.cache import segment
from kv_lm_eval.cache.store import MIN_HEADROOM, blank_lowest
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.methods import base
from kv_lm_eval.methods.evicted import choose

BUDGET = 12
METHODS = {
    "window": {"window_size": BUDGET},
    "streaming_llm": {"n_sink": 3, "window_size": BUDGET - 3},
    "streaming_llm lazy": {
        "n_sink": 3,
        "window_size": BUDGET - 3,
        "compress_every": 6,
        "max_drop": 2,
        "cache_slack": 5,
    },
    "h2o": {"max_capacity_prompt": BUDGET},
    "tova": {"max_capacity_prompt": BUDGET, "skip_layers": [0]},
    "l2_fixed": {"cache_size": BUDGET},
    "l2_fixed random": {"cache_size": BUDGET, "strategy": "random"},
    "knorm": {"keep_ratio": 0.8, "prune_after": BUDGET, "compress_every": 1},
    "random": {"max_capacity_prompt": BUDGET, "compress_every": 2},
}


def settings(name: str) -> dict[str, object]:
    return {"method": name.split()[0], **METHODS[name]}


@hypothesis.settings(deadline=None, derandomize=True, database=None)
@given(st.data())
def test_what_is_hidden_is_what_choose_leaves_out(data: st.DataObject) -> None:
    """Against the loop: the lowest score goes, of equal ones the newest; protected ones last, empty slots never."""
    rows, heads, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(6, 20))
    scored = data.draw(st.sampled_from([1, heads]))
    score = st.sampled_from([-1e38, -2.0, 0.0, 0.5, 0.5, 3.0, float("inf")])
    scores = torch.tensor([data.draw(st.lists(score, min_size=n, max_size=n)) for _ in range(rows * scored)])
    scores = scores.view(rows, scored, n)
    pos = torch.arange(n, dtype=torch.int32).repeat(rows, heads, 1)
    empty = data.draw(st.lists(st.integers(0, n - 1), max_size=3))
    pos[..., empty] = -1
    held = n - len(set(empty))
    drop = [data.draw(st.integers(0, min(4, held))) for _ in range(rows)]

    got = pos.clone()
    blank_lowest(scores, got, drop)

    kept = torch.tensor([[held - d] for d in drop])
    if min(drop) < held:
        index, valid = choose(scores.expand(rows, heads, n), pos, kept.expand(rows, heads))
    for b in range(rows):
        for k in range(heads):
            left = [i for i in range(n) if pos[b, k, i] >= 0]
            for _ in range(drop[b]):
                left.remove(min(left, key=lambda i: (scores[b, k % scored, i].item(), -i)))
            assert [i for i in range(n) if got[b, k, i] >= 0] == left
            if min(drop) < held:
                assert index[b, k][valid[b, k]].tolist() == left
    assert torch.equal(got[got >= 0], pos[got >= 0])


@pytest.mark.parametrize("lengths", [(30,), (40, 17, 3)])
@pytest.mark.parametrize("model", ["llama", "gpt_neox"])
@pytest.mark.parametrize("name", METHODS)
def test_holes_change_nothing_but_the_work(
    name: str, model: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 steps: holes are closed twice and more in between."""
    pair, steps = tiny.pair(model), 150
    rows = [tiny.tokens(n + steps, seed=n) for n in lengths]

    def run(few: int) -> tuple[list[torch.Tensor], list[object], int, int]:
        monkeypatch.setattr(segment, "FEW", few)
        cache, logits, kept = pair.cache(**settings(name)), [], []
        holes = most = 0
        for step in range(steps):
            fed = [r[:n] if step == 0 else r[n + step - 1 : n + step] for r, n in zip(rows, lengths, strict=True)]
            starts = [0 if step == 0 else n + step - 1 for n in lengths]
            logits.append(tiny.forward(pair.model, cache, fed, starts)[:, -1])
            kept.append([tiny.kept(cache, 1, b) for b in range(len(rows))])
            store = cache.stores[1]
            holes = max(holes, store.length - int(max(cache.held[1])))
            most = max(most, store.keys.untyped_storage().nbytes() // (store.keys[:, :, :1].numel() * 4))
        return logits, kept, holes, most

    got, kept, holes, most = run(segment.FEW)
    expected, expected_kept, none, _ = run(0)
    assert kept == expected_kept
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a - b).abs().max() <= 1e-5, f"step {step}"
    assert holes > 8 and none == 0, "the trial had holes, its other side none"
    most_kept = max(len(head) for at in kept for row in at for head in row)
    assert most <= max(*lengths, most_kept + 1 + MIN_HEADROOM), "holes are made in room that was there before"


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "tova"])
def test_forks_and_documents_with_holes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny.pair("llama")
    contexts, documents = [tiny.tokens(n, seed=n) for n in (60, 25, 5)], [tiny.tokens(n, seed=n) for n in (110, 40)]
    groups = [[tiny.tokens(n, seed=n) for n in lengths] for lengths in ((1, 7), (4, 2, 6), (3,))]

    def run(few: int) -> tuple[list[float], list[torch.Tensor]]:
        monkeypatch.setattr(segment, "FEW", few)
        scored = score_continuations(pair.model, lambda: pair.cache(**settings(name)), contexts, groups, 20)[0]
        streamed = score_documents(pair.model, lambda: pair.cache(**settings(name)), documents, Stream(5, 2))[0]
        return [c[0] for group in scored for c in group], [d.log_probs for d in streamed]

    got, expected = run(segment.FEW), run(0)
    assert got[0] == pytest.approx(expected[0], abs=1e-4)
    for a, b in zip(got[1], expected[1], strict=True):
        assert (a - b).abs().max() <= 1e-4


def test_methods_that_look_at_neighbours_are_not_slotwise() -> None:
    """Pooling and partitions go by the place of a slot among the others, which a hole would change."""
    assert not any(base.load(name).slotwise for name in ("snapkv", "pyramidkv", "adakv", "snapkv_comp", "lagkv"))

"""Every method with every treatment in bfloat16 and float16: scores in float32 or finer, nothing that is not a number,
ties to the older token."""

from __future__ import annotations

import functools
import itertools

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import base, evicted
from kv_lm_eval.methods.compression import Compression

BUDGET = 18
TREATMENTS = {
    **{name: evicted.load(name).example(BUDGET) for name in evicted.available()},
    "compensate, small blocks": {"block_size": 7, "weight": "uniform"},
    "compensate, all options": {
        "block_size": "full", "count_bias": "log_n", "key_space": "pre_rope", "empty_block": "drop", "weight": "uniform"
    },
}  # fmt: skip


@functools.cache
def half(dtype: torch.dtype) -> tuple[torch.nn.Module, object]:
    model = tiny.build("llama").to(dtype)
    return model, tiny.wrap(model, tiny.compression(method="streaming_llm", window_size=8))


def composed(method: str, treatment: str) -> Compression | str:
    """The two put together, or why they are refused."""
    every = {} if base.load(method).ring else {"compress_every": 2}
    more = {"evicted": treatment.split(",")[0], **TREATMENTS[treatment], **every}
    try:
        return tiny.compression(**tiny.free(method, BUDGET, **more))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("method", tiny.methods(lambda cls: cls.compresses))
def test_scores_are_no_coarser_than_float32_and_everything_held_is_finite(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, facts = half(dtype)
    dtypes, refused, cls = set(), [], base.load(method)
    by_attention = {"cam", "compensate"} if cls.weights is base.Method.weights else set()  # which it does not look at
    for treatment in TREATMENTS:
        compression = composed(method, treatment)
        if isinstance(compression, str):
            refused.append(treatment)
            continue
        score = type(compression.method).score

        def noted(self: base.Method, view: base.View, score=score) -> torch.Tensor:
            scores = score(self, view)
            dtypes.add(scores.dtype)
            return scores

        monkeypatch.setattr(type(compression.method), "score", noted)
        caches = [make_cache(compression, facts) for _ in range(2)]
        for cache, start in itertools.product(caches, range(6)):
            rows = [[2, *[7, 8] * 25], [3] * 33, tiny.tokens(12)] if start == 0 else [[5 + start]] * 3
            starts = [0, 0, 0] if start == 0 else [50 + start, 32 + start, 11 + start]
            logits = tiny.forward(model, cache, rows, starts=starts)
            assert logits[:, -1].isfinite().all(), (treatment, start)
        for one, two in zip(*(c.stores for c in caches), strict=True):
            assert one.keys.dtype == one.values.dtype == dtype
            real = (one.pos >= 0).expand(one.keys.shape[:3])
            assert one.keys[real].isfinite().all() and one.values[real].isfinite().all(), treatment
            assert torch.equal(one.pos, two.pos) and torch.equal(one.keys[real], two.keys[real]), "not deterministic"
        monkeypatch.undo()
    assert dtypes <= {torch.float32, torch.float64}
    assert dtypes and (cls.ring or set(refused) == by_attention), refused


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(0, 5),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(derandomize=True, deadline=None, database=None)
def test_equal_scores_go_to_the_older_token(scores, keep, empty, dtype):
    pos = torch.tensor([-1] * empty + list(range(len(scores))))
    padded = torch.tensor([9.0] * empty + scores, dtype=dtype)
    keep = min(keep, len(scores))
    index, valid = evicted.choose(padded.view(1, 1, -1), pos.view(1, 1, -1), torch.tensor([[keep]]))
    wanted = sorted(sorted(range(len(scores)), key=lambda t: (-scores[t], t))[:keep])
    assert valid.all() and pos[index[0, 0]].tolist() == wanted

"""Attention and what every slot receives of it, from weights made once, against both written out in float64."""

from __future__ import annotations

import random

import pytest
import torch

from kv_lm_eval.cache import received
from kv_lm_eval.cache.attention import Step, Visible

EXACT = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-2}


def written_out(step, seen):
    """Outputs [B, H, q, D] and sums [B, K, N], mean over the heads of a group."""
    group, q, n = step.query.shape[1] // seen.keys.shape[1], step.tokens, seen.keys.shape[2]
    query, keys, values = (x.double() for x in (step.query, seen.keys, seen.values))
    logits = query @ keys.repeat_interleave(group, 1).transpose(2, 3) * step.scaling
    if step.softcap is not None:
        logits = (logits / step.softcap).tanh() * step.softcap
    behind = torch.arange(n - q, n)[:, None] - torch.arange(n)
    hidden = (behind < 0) | (behind >= (step.window or n)) | (seen.pos < 0)[:, :, None]
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    return weights @ values.repeat_interleave(group, 1), weights.sum(2).unflatten(1, (-1, group)).mean(2)


@pytest.mark.parametrize("blocks", [(256, 2**18), (3, 40), (8, 1)])
@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
def test_random_shapes(monkeypatch, dtype, blocks):
    monkeypatch.setattr(received, "PACKED", blocks[0])
    monkeypatch.setattr(received, "NEAR_ELEMENTS", blocks[1])
    for seed in range(60):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        rows, kv_heads, group, size = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 3), draw.choice([4, 8])
        q, old, window = draw.randint(1, 30), draw.choice([0, 20]), draw.choice([None, draw.randint(1, 40)])
        query = torch.randn(rows, kv_heads * group, q, size).to(dtype)
        room = torch.randn(2, rows, kv_heads, old + q + 5, size).to(dtype)
        keys, values = room[0, :, :, : old + q], room[1, :, :, : old + q]
        pos = torch.arange(old + q).repeat(rows, 1, 1)
        whole = draw.random() < 0.8
        if not whole:
            pos[0, 0, : old // 2] = -1
        new = keys[:, :, old:], values[:, :, old:], pos[:, 0, old:]
        step = Step(0, query, *new, 0.4, window, draw.choice([None, 3.0]))
        out, mass = received.attend_counted(step, Visible(keys, values, pos, old, whole, reach=window))
        expected, counted = written_out(step, Visible(keys, values, pos, old, whole))
        assert out.dtype == dtype and mass.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=EXACT[dtype])
        torch.testing.assert_close(mass.double(), counted, rtol=EXACT[dtype], atol=10 * EXACT[dtype])


def test_blocks_do_not_shrink_with_the_text(monkeypatch):
    """Weights of a quarter million slots are made for as many queries at a time as those of a thousand."""
    made = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, *a, **k: made.append(tuple(x.shape)) or softmax(x, *a, **k))
    for n in (1024, 2**18):
        query, keys = torch.randn(1, 4, 300, 2), torch.randn(1, 2, n, 2)
        pos = torch.arange(n)[None, None]
        step = Step(0, query, keys[:, :, -300:], keys[:, :, -300:], pos[:, 0, -300:], 1.0)
        received.attend_counted(step, Visible(keys, keys, pos, n - 300, True))
    assert {shape[1] for shape in made} == {256, 88}  # two heads of 128 queries, then the last 44
    assert len([s for s in made if s[2] > 1024]) == 2 * 3

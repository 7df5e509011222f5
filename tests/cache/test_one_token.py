"""A step of one token that counts attention: its output and what each slot receives, against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from kv_lm_eval.cache.attention import Step, Visible
from kv_lm_eval.cache.received import attend_one


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads_of_pos", [1, 2])
def test_one_token_sees_what_it_may_and_gives_what_it_gives(
    heads_of_pos: int, window: int | None, biased: bool
) -> None:
    b, kv, group, n, d = 3, 2, 2, 7, 8
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(b, kv * group, 1, d, generator=generator)
    keys, values = torch.randn(2, b, kv, n, d, generator=generator)
    bias = torch.randn(b, kv, n, generator=generator) if biased else None
    slot_pos = torch.tensor([[-1, 0, 1, -1, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6], [-1, -1, -1, -1, -1, 0, 1]])
    pos = slot_pos[:, -1:]
    slot_pos = slot_pos[:, None].repeat(1, heads_of_pos, 1)
    if heads_of_pos == 2:
        slot_pos[0, 1, 1:4] = torch.tensor([-1, 1, 2])

    step = Step(0, query, keys[:, :, -1:], values[:, :, -1:], pos, 0.3, window)
    out, mass = attend_one(step, Visible(keys, values, slot_pos, n - 1, False, bias))

    for row in range(b):
        for head in range(kv):
            received = [0.0] * n
            for g in range(group):
                q, at = query[row, head * group + g, 0].double(), int(pos[row])
                places = slot_pos[row, head % heads_of_pos].tolist()
                seen = [i for i, p in enumerate(places) if p >= 0 and at - p < (window or n)]
                logits = {i: 0.3 * float(q @ keys[row, head, i].double()) for i in seen}
                logits = {i: x + (0.0 if bias is None else float(bias[row, head, i])) for i, x in logits.items()}
                total = sum(math.exp(x) for x in logits.values())
                expected = sum(math.exp(x) / total * values[row, head, i].double() for i, x in logits.items())
                assert (out[row, head * group + g, 0] - expected).abs().max() <= 1e-6
                for i, x in logits.items():
                    received[i] += math.exp(x) / total / group
            assert mass[row, head].tolist() == pytest.approx(received, abs=1e-6)
    assert out.isfinite().all()

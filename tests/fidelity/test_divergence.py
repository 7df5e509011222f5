"""Numbers per token against plain loops over explicit distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kv_lm_eval.metrics import divergence


def reference(base: list[float], ours: list[float], target: int) -> tuple[float, float, float, bool]:
    """The definitions, one number at a time, in Python's own floats."""

    def log_probs(logits):
        most = max(logits)
        total = math.log(math.fsum(math.exp(x - most) for x in logits)) + most
        return [x - total for x in logits]

    log_p, log_q = log_probs(base), log_probs(ours)
    kl = math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True) if p > -math.inf)
    return kl, log_p[target], log_q[target], ours[base.index(max(base))] == max(ours)


def draw(apart: float, n: int = 7, vocab: int = 50, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    base = torch.randn(n, vocab, dtype=torch.float64) * scale
    return base, base + torch.randn(n, vocab, dtype=torch.float64) * apart, torch.randint(vocab, (n,))


@pytest.mark.parametrize("apart", [1e-7, 1e-3, 0.3, 2.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_number_is_that_of_plain_loops(apart, dtype, monkeypatch):
    monkeypatch.setattr(divergence, "BLOCK_ELEMENTS", 100)  # blocks of two tokens
    base, ours, targets = draw(apart)
    base, ours = base.to(dtype), ours.to(dtype)
    got = divergence.of_logits(base, ours, targets)
    wanted = [reference(*x) for x in zip(base.tolist(), ours.tolist(), targets.tolist(), strict=True)]
    exact = dtype == torch.float64
    assert got.kl.dtype == (np.float64 if exact else np.float32)
    for i, values in enumerate((got.kl, got.base_log_probs, got.log_probs)):
        expected = [w[i] for w in wanted]
        assert values == pytest.approx(expected, rel=1e-9 if exact else 2e-6, abs=1e-15 if exact and i == 0 else 3e-7)
    assert got.same_top.tolist() == [w[3] for w in wanted]
    assert (got.kl >= 0).all()


def test_logits_that_differ_by_rounding_alone_have_no_divergence_to_speak_of():
    base, _, targets = draw(0.0, vocab=50_000)
    base = base.float()
    ours = base + torch.randn_like(base) * 1e-6 + 3  # a shift of all logits is none
    got = divergence.of_logits(base, ours, targets)
    assert (got.kl >= 0).all() and got.kl.max() < 1e-11
    plain = (base.softmax(-1) * (base.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
    assert plain.abs().max() > 1e-8  # the usual formula, in the same float32


def test_tokens_that_one_side_rules_out():
    inf = math.inf
    base = torch.tensor([[0.0, 1.0, -inf, 2.0], [0.0, 1.0, 0.5, 2.0], [0.0, 1.0, -200.0, 2.0]])
    ours = torch.tensor([[0.3, 1.0, 5.0, 1.0], [0.0, 1.0, -inf, 2.0], [0.0, -3.0, 190.0, 2.0]])
    got = divergence.of_logits(base, ours, torch.tensor([0, 0, 0]))
    assert got.kl[0] == pytest.approx(reference(base[0].tolist(), ours[0].tolist(), 0)[0], rel=1e-6)
    assert got.kl[1] == inf
    assert got.kl[2] == pytest.approx(reference(base[2].tolist(), ours[2].tolist(), 0)[0], rel=1e-6)
    both = divergence.of_logits(base[:1], base[:1], torch.tensor([0]))
    assert both.kl[0] == 0 and both.same_top[0]


def test_nothing_to_compare_is_nothing():
    got = divergence.of_logits(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    assert len(got) == 0 and got.same_top.dtype == bool
    assert len(divergence.joined([])) == 0


def test_what_is_held_beside_the_logits_does_not_grow_with_the_tokens(monkeypatch):
    """The largest tensor that is made is a block, however many tokens of however large a vocabulary."""
    seen = []
    original = torch.Tensor.log_softmax

    def noting(self, *args, **kwargs):
        seen.append(self.numel())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "log_softmax", noting)
    base = torch.zeros(1, 1, dtype=torch.bfloat16).expand(300, 150_000)  # no memory of its own
    monkeypatch.setattr(divergence, "_block", lambda b, o, t, d, f=divergence._block: f(b[:1], o[:1], t[:1], d))
    divergence.of_logits(base, base, torch.zeros(300, dtype=torch.long))
    assert max(seen) == 150_000 and len(seen) == 2 * math.ceil(300 / (divergence.BLOCK_ELEMENTS // 150_000))

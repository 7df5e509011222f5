"""How far one distribution over the next token is from another: the numbers per token of a fidelity report.

The base (teacher) is the full cache, the other one (student) the method under test. The divergence is KL(base || ours),
in nats, as llama.cpp's: what the base thinks possible and the method thinks less possible is what counts.

Each term of the sum is taken as p (exp(d) - 1 - d) with d = log q - log p, which is never negative and sums to the
same, since both distributions sum to 1. So float32 logits that differ by rounding alone (1e-6) give a divergence of
1e-12, where p log(p/q) would give the rounding itself, 1e-7 of either sign.

Shapes: n tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch

MOST = 80.0  # difference of log-probabilities up to which exp does not overflow in float32
BLOCK_ELEMENTS = 2**19  # of the vocabulary by tokens, computed at a time: what is held beside the logits


@dataclass
class Divergence:
    """Numbers of n tokens.

    Attributes:
        kl: [n] KL(base || ours) in nats. base_log_probs, log_probs: [n] of the token that came, in nats, under the base
            and under the method. same_top: [n] whether no token is likelier under the method than the base's likeliest.
    """

    kl: np.ndarray
    base_log_probs: np.ndarray
    log_probs: np.ndarray
    same_top: np.ndarray

    def __len__(self) -> int:
        return len(self.kl)

    def delta_p(self) -> np.ndarray:
        """[n] probability of the token that came, ours minus the base's."""
        return np.exp(self.log_probs.astype(np.float64)) - np.exp(self.base_log_probs.astype(np.float64))


def joined(parts: list[Divergence]) -> Divergence:
    """Stretches of tokens one after the other."""
    if not parts:
        return Divergence(*(np.zeros(0, dtype=d) for d in (np.float32, np.float32, np.float32, bool)))
    return Divergence(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Divergence)))


@torch.inference_mode()
def of_logits(base: torch.Tensor, ours: torch.Tensor, targets: torch.Tensor) -> Divergence:
    """Compares two blocks of logits, [n, V] each, in float32, or in float64 where one of them is.

    Args:
        targets: [n] the tokens that came.
    """
    dtype = torch.promote_types(torch.promote_types(base.dtype, ours.dtype), torch.float32)
    if not len(targets):
        return joined([])
    size = max(1, BLOCK_ELEMENTS // base.shape[-1])
    targets = targets.to(base.device)
    parts = [_block(*part, dtype) for part in zip(base.split(size), ours.split(size), targets.split(size), strict=True)]
    return joined([Divergence(*(x.cpu().numpy() for x in part)) for part in parts])


def _block(
    base: torch.Tensor, ours: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    ours = ours.to(base.device)
    same_top = ours.gather(1, base.argmax(-1, keepdim=True)).squeeze(1) == ours.amax(-1)
    log_p, log_q = (x.log_softmax(-1, dtype=dtype) for x in (base, ours))
    of_targets = [x.gather(1, targets[:, None]).squeeze(1) for x in (log_p, log_q)]
    return (_kl(log_p, log_q), *of_targets, same_top)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """[n] from two blocks of log-probabilities [n, V]; the first one is overwritten."""
    difference = log_q - log_p
    least, most = (float(x) for x in difference.aminmax())  # NaN where both rule a token out
    p = log_p.exp_()
    if -math.inf < least and most < MOST:
        return torch.linalg.vecdot(difference.expm1().sub_(difference), p)
    near = torch.expm1(difference).sub_(difference).mul_(p)
    q = log_q.exp()
    terms = torch.where(difference.abs() < 1, near, (q - p).sub_(difference.mul_(p)))
    return torch.where(p == 0, q, terms).sum(-1)  # the base rules the token out, by logits of -inf too

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
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

MOST = 80.0  # difference of log-probabilities up to which exp does not overflow in float32
BLOCK_ELEMENTS = 2**19  # of the vocabulary by tokens, computed at a time: what is held beside the logits
NUMBERS = ("kl", "base_log_probs", "log_probs", "same_top")  # of every token
TOP = 5


@dataclass
class Top:
    """The likeliest tokens, most likely first: ids, probs [n, 2, TOP] under the base and under the method."""

    ids: np.ndarray
    probs: np.ndarray


@dataclass
class Divergence:
    """Numbers of n tokens.

    Attributes:
        kl: [n] KL(base || ours) in nats. base_log_probs, log_probs: [n] of the token that came, in nats, under the base
            and under the method. same_top: [n] whether no token is likelier under the method than the base's likeliest.
        top: the likeliest tokens, where they were asked for.
    """

    kl: np.ndarray
    base_log_probs: np.ndarray
    log_probs: np.ndarray
    same_top: np.ndarray
    top: Top | None = None

    def __len__(self) -> int:
        return len(self.kl)

    def delta_p(self) -> np.ndarray:
        """[n] probability of the token that came, ours minus the base's."""
        return np.exp(self.log_probs.astype(np.float64)) - np.exp(self.base_log_probs.astype(np.float64))


def of_numbers(arrays: Iterable[np.ndarray], top: Top | None = None) -> Divergence:
    """From arrays [n] in the order of NUMBERS."""
    kl, base_log_probs, log_probs, same_top = arrays
    return Divergence(kl, base_log_probs, log_probs, same_top, top)


def joined(parts: list[Divergence]) -> Divergence:
    """Stretches of tokens one after the other."""
    if not parts:
        return of_numbers(np.zeros(0, dtype=d) for d in (np.float32, np.float32, np.float32, bool))
    tops = [p.top for p in parts if p.top is not None]
    top = None
    if len(tops) == len(parts):
        top = Top(*(np.concatenate([getattr(one, name) for one in tops]) for name in ("ids", "probs")))
    return of_numbers((np.concatenate([getattr(p, name) for p in parts]) for name in NUMBERS), top)


@torch.inference_mode()
def of_logits(base: torch.Tensor, ours: torch.Tensor, targets: torch.Tensor, top: bool = False) -> Divergence:
    """Compares two blocks of logits, [n, V] each, in float32, or in float64 where one of them is.

    Args:
        targets: [n] the tokens that came. top: whether the likeliest tokens are noted too.
    """
    dtype = torch.promote_types(torch.promote_types(base.dtype, ours.dtype), torch.float32)
    if not len(targets):
        return joined([])
    size = max(1, BLOCK_ELEMENTS // base.shape[-1])
    targets = targets.to(base.device)
    parts = [_block(*part, dtype) for part in zip(base.split(size), ours.split(size), targets.split(size), strict=True)]
    found = joined([of_numbers(x.cpu().numpy() for x in part) for part in parts])
    if top:
        both = [_top(x, size, dtype) for x in (base, ours)]
        found.top = Top(*(np.stack(side, axis=1) for side in zip(*both, strict=True)))
    return found


def _top(logits: torch.Tensor, size: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """[n, TOP] ids and probabilities from logits [n, V], `size` rows at a time."""
    found = [part.softmax(-1, dtype=dtype).topk(min(TOP, part.shape[-1])) for part in logits.split(size)]
    ids, probs = (torch.cat([getattr(one, name) for one in found]) for name in ("indices", "values"))
    return ids.int().cpu().numpy(), probs.float().cpu().numpy()


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

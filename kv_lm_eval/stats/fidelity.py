"""llama.cpp's statistics of a quantised model against its base, for any cache against the full one.

Names and definitions are those of `llama-perplexity --kl-divergence`, so that its users can compare: KL(base || ours)
and Δp = p(ours) - p(base) of the token that came; a percentile lies between the two nearest values, in proportion;
errors are those of a mean of independent tokens. Neighbouring tokens are not independent, so an error here is too small
by a factor that depends on the text: `interval` is the honest one, over texts or blocks of tokens (blocks.py).

Reference: ggml-org/llama.cpp@050fc7f, tools/perplexity/perplexity.cpp, kl_divergence. Deviations: the base's
probabilities are those of the same run, not 16-bit numbers from a file; no term is left out (theirs: those with
p < e^-16); no error where there are fewer than two tokens, where theirs is 0 up to ten.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_lm_eval.stats import blocks

KL_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
DELTA_P_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, None where there is none."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Spread:
    """The largest, the smallest and what lies between them, by percentile."""

    largest: float
    percentiles: dict[float, float]
    smallest: float


@dataclass(frozen=True)
class Statistics:
    """Of n tokens, n >= 1.

    Attributes:
        ppl, ppl_base: exp of the mean negative log-likelihood. log_ppl_ratio, ppl_ratio, ppl_difference: ours to the
            base, ours minus the base's; their errors know that both are of the same tokens. correlation: of the two
            log-likelihoods over the tokens, in [-1, 1]; None where one of them is the same everywhere.
        kl, kl_spread: nats. delta_p, delta_p_rms, delta_p_spread: probabilities, in [-1, 1].
        same_top: share of tokens on which both find the same one most likely.
    """

    tokens: int
    ppl: Estimate
    ppl_base: Estimate
    log_ppl_ratio: Estimate
    ppl_ratio: Estimate
    ppl_difference: Estimate
    correlation: float | None
    kl: Estimate
    kl_spread: Spread
    delta_p: Estimate
    delta_p_rms: Estimate
    delta_p_spread: Spread
    same_top: Estimate


def of_tokens(kl: np.ndarray, base_log_probs: np.ndarray, log_probs: np.ndarray, same_top: np.ndarray) -> Statistics:
    """Statistics of numbers per token, [n] each: see `metrics.divergence.Divergence`."""
    kl, base, ours = (np.asarray(x, dtype=np.float64) for x in (kl, base_log_probs, log_probs))
    n = len(kl)
    assert n and len(base) == len(ours) == len(same_top) == n
    delta_p = np.exp(ours) - np.exp(base)
    log_ppl, log_ppl_base, ratio = _mean(-ours), _mean(-base), _mean(base - ours)
    ppl, ppl_base = _exponential(log_ppl), _exponential(log_ppl_base)
    # the error of exp(a) - exp(b) to first order, from what each token adds to both
    with np.errstate(invalid="ignore"):
        difference = _mean(ppl_base.value * base - ppl.value * ours)
    squares = _mean(delta_p**2)
    rms = math.sqrt(squares.value)
    share = float(np.mean(same_top))
    return Statistics(
        tokens=n,
        ppl=ppl,
        ppl_base=ppl_base,
        log_ppl_ratio=ratio,
        ppl_ratio=_exponential(ratio),
        ppl_difference=Estimate(ppl.value - ppl_base.value, difference.error),
        correlation=_correlation(base, ours),
        kl=_mean(kl),
        kl_spread=_spread(kl, KL_PERCENTILES),
        delta_p=_mean(delta_p),
        delta_p_rms=Estimate(rms, None if squares.error is None else 0.5 * squares.error / rms if rms else 0.0),
        delta_p_spread=_spread(delta_p, DELTA_P_PERCENTILES),
        same_top=Estimate(share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None),
    )


def interval(kl: Sequence[np.ndarray], texts: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """Mean KL with an interval that knows of neighbouring tokens; one array a document, see `blocks.interval`."""
    found = blocks.interval([np.asarray(x, dtype=np.float64) for x in kl], texts=texts)
    if found["low"] is not None:
        found["low"] = max(0.0, found["low"])  # no divergence is below
    return found


def _mean(values: np.ndarray) -> Estimate:
    n = len(values)
    with np.errstate(invalid="ignore", over="ignore"):  # an infinite divergence has an infinite mean and no error
        mean = float(values.mean())
        error = float(values.std() / math.sqrt(n - 1)) if n > 1 else math.nan
    return Estimate(mean, error if math.isfinite(error) else None)


def _exponential(log: Estimate) -> Estimate:
    """exp of an estimate, with the error to first order."""
    value = math.exp(log.value) if log.value < 700 else math.inf
    return Estimate(value, None if log.error is None or math.isinf(value) else value * log.error)


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    with np.errstate(invalid="ignore"):
        a, b = a - a.mean(), b - b.mean()
        below = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / below if below and math.isfinite(below) else None


def _spread(values: np.ndarray, percentiles: Sequence[float]) -> Spread:
    ordered = np.sort(values)
    found = {p: _percentile(ordered, p / 100) for p in percentiles}
    return Spread(float(ordered[-1]), found, float(ordered[0]))


def _percentile(ordered: np.ndarray, share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    part = place - below
    if not part:
        return float(ordered[below])
    return float((1 - part) * ordered[below] + part * ordered[below + 1])


def as_plain(found: Statistics) -> dict[str, Any]:
    """For JSON, one level deep: "kl", "kl_se", "kl_max", "kl_p99.9", "kl_min", ..."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if isinstance(value, Estimate):
            out |= {field.name: value.value, f"{field.name}_se": value.error}
        elif isinstance(value, Spread):
            name = field.name.removesuffix("_spread")
            out[f"{name}_max"] = value.largest
            out |= {f"{name}_p{p:g}": x for p, x in value.percentiles.items()}
            out[f"{name}_min"] = value.smallest
        else:
            out[field.name] = value
    return out

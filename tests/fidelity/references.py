"""What the tests of fidelity compare with: models in float64, full forwards with masks, and plain loops over them."""

from __future__ import annotations

import functools
import math

import tiny
import torch
import transformers as tf
from cache.test_evict_equals_mask import masked_logits

from kv_lm_eval.engine.check import wrap
from kv_lm_eval.metrics.divergence import Divergence

PREFIX = 5


@functools.cache
def pair64(name: str) -> tiny.Pair:
    """A model under our attention and its stock twin, both in float64 (transformers' eager attention would not be)."""
    model, stock = tiny.build(name).double(), tiny.build(name).double()
    in_cache = name not in ("gpt2", "mistral_sliding")
    settings = {"method": "streaming_llm", "window_size": 8} if in_cache else {"method": "full"}
    return tiny.Pair(model, stock, wrap(model, tiny.compression(**settings)))


@torch.inference_mode()
def stock_logits(stock: tf.PreTrainedModel, row: list[int]) -> torch.Tensor:
    """One forward of the whole row, nothing hidden."""
    return stock(input_ids=torch.tensor([row]), use_cache=False).logits[0]


def cut_once(pair: tiny.Pair, row: list[int], cut: int, **settings: object) -> torch.Tensor:
    """Logits of a whole row in one forward, in which tokens from `cut` on do not see what a cut after the first `cut`
    tokens evicts."""
    cache = pair.cache(**settings)
    tiny.forward(pair.model, cache, [row[:cut]])
    kept = [tiny.kept(cache, layer) for layer in range(pair.facts.num_layers)]
    return masked_logits(pair.stock, row, cut, kept)


@torch.inference_mode()
def seen(stock: tf.PreTrainedModel, row: list[int], visible: list[set[int]]) -> torch.Tensor:
    """Logits of a row in one forward in which token t sees the tokens visible[t]."""
    n = len(row)
    mask = torch.full((1, 1, n, n), torch.finfo(torch.float32).min, dtype=torch.float64)
    for t, positions in enumerate(visible):
        mask[0, 0, t, sorted(positions)] = 0
    return stock(input_ids=torch.tensor([row]), attention_mask=mask, use_cache=False).logits[0]


def window_of(n: int, n_sink: int, window: int, every: int) -> list[set[int]]:
    """What each of n tokens sees under sinks and a window, cut whenever `every` more of them are held."""
    held: list[int] = []
    out = []
    for t in range(n):
        held.append(t)
        out.append(set(held))
        if len(held) == n_sink + window + every:
            held = held[:n_sink] + held[-window:]
    return out


def loops(base: torch.Tensor, ours: torch.Tensor, targets: list[int]) -> dict[str, list[float]]:
    """Each number of `Divergence`, from its definition, one token and one word of the vocabulary at a time."""

    def log_probs(logits: list[float]) -> list[float]:
        most = max(logits)
        total = math.log(math.fsum(math.exp(x - most) for x in logits)) + most
        return [x - total for x in logits]

    out: dict[str, list[float]] = {"kl": [], "base_log_probs": [], "log_probs": [], "same_top": []}
    for one, other, target in zip(base.tolist(), ours.tolist(), targets, strict=True):
        p, q = log_probs(one), log_probs(other)
        out["kl"].append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
        out["base_log_probs"].append(p[target])
        out["log_probs"].append(q[target])
        out["same_top"].append(float(other[one.index(max(one))] == max(other)))
    return out


def worst(got: Divergence, wanted: dict[str, list[float]]) -> float:
    """The largest difference of any number of any token."""
    return max(
        abs(float(a) - b)
        for name, values in wanted.items()
        for a, b in zip(getattr(got, name).tolist(), values, strict=True)
    )

"""On real weights: a streaming cache's loss is that of keys cached before their rotation, numbered by their place."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import real_models as real
import torch
from model.test_requests import request
from test_streaming_llm import Reference

pytestmark = pytest.mark.filterwarnings("ignore")
NATS = 1e-3  # a token: float32 on both sides, sums in another order


class RealReference(Reference):
    """The suite's reference with the real model's own constants, in float32, all heads and places at once."""

    def __init__(self, model: Any, n_sink: int, window: int, every: int) -> None:
        super().__init__(model, n_sink, window, every)
        self.weights = dict(model.state_dict())

    def _rms_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean() + self.config.rms_norm_eps).sqrt() * self.weights[name + ".weight"]

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys.append(k)
        values.append(v)
        group = q.shape[0] // k.shape[0]
        rotated = torch.stack([self._rotated_all(key, place) for place, key in enumerate(keys)])  # [n, KV heads, D]
        query = self._rotated_all(q, len(keys) - 1).view(k.shape[0], group, -1)
        weights = (torch.einsum("kgd,nkd->kgn", query, rotated) / self._head_size**0.5).softmax(-1)
        out = torch.einsum("kgn,nkd->kgd", weights, torch.stack(values))
        if len(keys) == self.n_sink + self.window + self.every:
            for held in (keys, values):
                held[self.n_sink : len(held) - self.window] = []
        return out.reshape(-1)

    def _rotated_all(self, x: torch.Tensor, place: int) -> torch.Tensor:
        cos, sin = self._angles(place)
        a, b = x[:, : len(cos)], x[:, len(cos) :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    @functools.cache  # noqa: B019  the reference lives as long as its test
    def _angles(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        theta, dims = self.config.rope_parameters["rope_theta"], self._head_size
        angles = place * theta ** (-torch.arange(0, dims, 2).double() / dims)
        return angles.cos().float(), angles.sin().float()


@torch.inference_mode()
def expected(name: str, prefix: int, tokens: list[int], **settings: int) -> list[float]:
    model = real.stock(name)
    reference = RealReference(model, **settings)
    out = []
    for fed, scored in zip([prefix, *tokens], tokens, strict=False):
        out.append(float(reference.feed(fed).log_softmax(-1)[scored]))
    return out


@pytest.mark.parametrize(("name", "length"), [("smollm2", 80), ("qwen05", 48)])  # Gemma has two kinds of layers
@pytest.mark.parametrize("every", [1, 8])
def test_losses_are_those_of_keys_cached_before_rotation(name: str, length: int, every: int) -> None:
    real.folder(name)
    n_sink, window = 4, 20
    text = real.tokenizer(name).decode(real.tokens(name, length))
    settings = {"method": "streaming_llm", "n_sink": n_sink, "window_size": window, "compress_every": every}
    lm = real.load(name, **settings)
    reading = {"protocol": "streaming"}
    (score,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text, reading)], disable_tqdm=True)
    prefix, record = lm.prefix_token_id, score.record
    del lm
    gc.collect()
    reference = expected(name, prefix, record.tokens.tolist(), n_sink=n_sink, window=window, every=every)
    assert len(record.evictions) >= (length - n_sink - window) // every - 1
    assert record.log_probs.tolist() == pytest.approx(reference, abs=NATS)

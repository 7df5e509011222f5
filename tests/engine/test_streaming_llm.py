"""StreamingLLM against its definition: unrotated keys in the cache, numbered by their place in it at every token.

The reference is Llama and GPT-NeoX written anew over the weights of a tiny model, in float64, one token at a time; it
shares no code with ours, nor with transformers. Ours keeps true positions and moves the sinks instead.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as tf

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.streaming import Stream, score_documents

MODELS = ("llama", "gpt_neox")
# float64 weights, but the models' own rotary tables and norms are float32: far below the several nats between policies
TOLERANCE = 1e-4


class Reference:
    """Attention sinks and a window of `window` tokens, cut when `every` more than these are held."""

    def __init__(self, model: tf.PreTrainedModel, n_sink: int, window: int, every: int, refresh: int = 0) -> None:
        self.weights = {k: v.double() for k, v in model.state_dict().items()}
        self.config, self.neox = model.config, model.config.model_type == "gpt_neox"
        self.n_sink, self.window, self.every, self.refresh = n_sink, window, every, refresh
        self.keys: list[list[torch.Tensor]] = [[] for _ in range(self.config.num_hidden_layers)]  # unrotated [heads, D]
        self.values: list[list[torch.Tensor]] = [[] for _ in range(self.config.num_hidden_layers)]
        self.fed = 0

    def feed(self, token: int) -> torch.Tensor:
        """Logits [V] after one more token."""
        self.fed += 1
        return (self._neox if self.neox else self._llama)(token)

    def _llama(self, token: int) -> torch.Tensor:
        x = self.weights["model.embed_tokens.weight"][token]
        for i in range(self.config.num_hidden_layers):
            name = f"model.layers.{i}."
            y = self._rms_norm(name + "input_layernorm", x)
            heads = [self._linear(f"{name}self_attn.{p}_proj", y).view(-1, self._head_size) for p in "qkv"]
            x = x + self._linear(name + "self_attn.o_proj", self._attend(i, *heads))
            y = self._rms_norm(name + "post_attention_layernorm", x)
            y = F.silu(self._linear(name + "mlp.gate_proj", y)) * self._linear(name + "mlp.up_proj", y)
            x = x + self._linear(name + "mlp.down_proj", y)
        return self._linear("lm_head", self._rms_norm("model.norm", x))

    def _neox(self, token: int) -> torch.Tensor:
        x = self.weights["gpt_neox.embed_in.weight"][token]
        for i in range(self.config.num_hidden_layers):
            name = f"gpt_neox.layers.{i}."
            y = self._linear(name + "attention.query_key_value", self._layer_norm(name + "input_layernorm", x))
            q, k, v = y.view(-1, 3, self._head_size).unbind(1)
            attended = self._linear(name + "attention.dense", self._attend(i, q, k, v))
            y = self._layer_norm(name + "post_attention_layernorm", x)
            y = self._linear(name + "mlp.dense_4h_to_h", F.gelu(self._linear(name + "mlp.dense_h_to_4h", y)))
            x = x + attended + y
        return self._linear("lm_head", self._layer_norm("gpt_neox.final_layer_norm", x))

    @property
    def _head_size(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _layer_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape, self.weights[name + ".weight"], self.weights[name + ".bias"], 1e-5)

    def _rms_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean() + 1e-6).sqrt() * self.weights[name + ".weight"]

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys.append(k)
        values.append(v)
        last = len(keys) - 1
        out = []
        for head in range(q.shape[0]):
            kv_head = head // (q.shape[0] // k.shape[0])
            query = self._rotated(q[head], last)
            scores = [
                query @ self._rotated(key[kv_head], place) / math.sqrt(self._head_size)
                for place, key in enumerate(keys)
            ]
            weights = torch.stack(scores).softmax(0)
            out.append(weights @ torch.stack([value[kv_head] for value in values]))
        if len(keys) == self.n_sink + self.window + self.refresh + self.every:
            for held in (keys, values):
                dropped = held[self.n_sink : len(held) - self.window]
                held[self.n_sink : len(held) - self.window] = []
                if self.refresh:  # the negative control: evenly spaced dropped ones come back at the end
                    places = np.unique(np.linspace(0, len(dropped) - 1, self.refresh).round().astype(int))
                    held += [dropped[i] for i in places]
        return torch.cat(out)

    def _rotated(self, x: torch.Tensor, place: int) -> torch.Tensor:
        cos, sin = self._angles(place)
        half = len(cos)
        a, b, rest = x[:half], x[half : 2 * half], x[2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest])

    @functools.cache  # noqa: B019  the reference lives as long as its test
    def _angles(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        dims = int(self._head_size * self.config.rope_parameters.get("partial_rotary_factor", 1.0))
        angles = place * 10_000.0 ** (-torch.arange(0, dims, 2).double() / dims)
        return angles.cos(), angles.sin()


@torch.inference_mode()
def reference_scores(
    model: tf.PreTrainedModel, tokens: list[int], n_sink: int, window: int, every: int, refresh: int = 0
) -> torch.Tensor:
    reference = Reference(model, n_sink, window, every, refresh)
    logits = torch.stack([reference.feed(t) for t in tokens[:-1]])
    return logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]].float()


@functools.cache
def doubled(name: str) -> tiny.Pair:
    """Two heads, so that a quarter of GPT-NeoX's head is more than one pair of dimensions."""
    heads = {"num_attention_heads": 2} if name == "gpt_neox" else {}
    model, stock = tiny.build(name, **heads).double(), tiny.build(name, **heads).double()
    return tiny.Pair(model, stock, wrap(model, tiny.compression(method="streaming_llm", window_size=8)))


def our_scores(name: str, rows: list[list[int]], every: int, **settings: object) -> list[torch.Tensor]:
    pair, prefixes = doubled(name), {row[0] for row in rows}
    (prefix,) = prefixes
    documents = [row[1:] for row in rows]
    scored, _ = score_documents(pair.model, lambda: pair.cache(**settings), documents, Stream(prefix, every))
    return [document.log_probs for document in scored]


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_itself_is_the_model_while_nothing_is_evicted(name: str) -> None:
    stock, row = doubled(name).stock, tiny.tokens(25)
    with torch.inference_mode():
        expected = stock(input_ids=torch.tensor([row[:-1]])).logits[0].log_softmax(-1)[torch.arange(24), row[1:]]
    assert (reference_scores(stock, row, 4, 60, 1) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("n_sink", "window", "every"), [(4, 12, 1), (1, 9, 1), (4, 12, 5)])
@pytest.mark.parametrize("name", MODELS)
def test_in_cache_positions_are_those_of_the_paper(name: str, n_sink: int, window: int, every: int) -> None:
    row = tiny.tokens(110, seed=n_sink)
    expected = reference_scores(doubled(name).stock, row, n_sink, window, every)
    sinks = {"method": "streaming_llm", "n_sink": n_sink, "window_size": window}
    (got,) = our_scores(name, [row], every, **sinks)
    (absolute,) = our_scores(name, [row], every, **sinks, positions="absolute")
    assert (got - expected).abs().max() <= TOLERANCE
    assert (absolute - expected).abs().max() > 0.1, "the two numberings differ, so the comparison would notice"


@pytest.mark.parametrize(("every", "refresh"), [(1, 2), (5, 3), (5, 7)])
@pytest.mark.parametrize("name", MODELS)
def test_reinserted_tokens_are_the_last_in_the_cache(name: str, every: int, refresh: int) -> None:
    rows = [[7, *tiny.tokens(n, seed=n)] for n in (70, 41, 10)]
    settings = {"n_sink": 3, "window_size": 10, "refresh_budget": refresh, "refresh_policy": "uniform"}
    got = our_scores(name, rows, every, method="streaming_llm", **settings)
    for row, scores in zip(rows, got, strict=True):
        expected = reference_scores(doubled(name).stock, row, 3, 10, every, refresh)
        assert (scores - expected).abs().max() <= TOLERANCE


def test_without_sinks_the_numbering_makes_no_difference() -> None:
    row = tiny.tokens(70)
    expected = reference_scores(doubled("llama").stock, row, 0, 12, 1)
    for settings in (
        {"method": "window", "window_size": 12},
        {"method": "streaming_llm", "n_sink": 0, "window_size": 12},
    ):
        assert (our_scores("llama", [row], 1, **settings)[0] - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_different_lengths_each_have_their_own_sinks_moved(name: str) -> None:
    rows = [[7, *tiny.tokens(n, seed=n)] for n in (60, 33, 18)]
    got = our_scores(name, rows, 1, method="streaming_llm", n_sink=3, window_size=10)
    for row, scores in zip(rows, got, strict=True):
        assert (scores - reference_scores(doubled(name).stock, row, 3, 10, 1)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_after_a_left_padded_prefill_the_sinks_are_the_first_real_tokens_of_each_row(name: str) -> None:
    """A prompt within sinks + window, then single tokens: the paper's rule applies from the first eviction on."""
    pair, lengths, steps = doubled(name), (14, 9, 2), 30
    rows = [tiny.tokens(n + steps, seed=n) for n in lengths]
    cache: CompressedCache = pair.cache(method="streaming_llm", n_sink=3, window_size=12)
    references = [Reference(pair.stock, 3, 12, 1) for _ in rows]
    with torch.inference_mode():
        for step in range(steps):
            fed = [r[:n] if step == 0 else r[n + step - 1 : n + step] for r, n in zip(rows, lengths, strict=True)]
            got = tiny.forward(pair.model, cache, fed, starts=[0 if step == 0 else n + step - 1 for n in lengths])[
                :, -1
            ]
            for b, (reference, tokens) in enumerate(zip(references, fed, strict=True)):
                expected = [reference.feed(t) for t in tokens][-1]
                assert (got[b] - expected).abs().max() <= 10 * TOLERANCE, f"row {b}, step {step}"

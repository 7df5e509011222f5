"""A key rotated by a delta is the key that the model itself makes delta tokens later."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as tf

from kv_lm_eval.cache.attention import Step
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.errors import UserError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
KINDS = {
    "default": ("llama", {}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "a quarter of the head": ("gpt_neox", {"num_attention_heads": 2}),
    "two thetas": ("gemma3", {}),
    "two thetas by the configuration alone": ("olmo3", {}),
    "one tensor at a time": ("gemma3n", {}),
}
SINKS = tiny.compression(method="streaming_llm", window_size=8)


def stock_keys(model: tf.PreTrainedModel, row: list[int], start: int) -> list[torch.Tensor]:
    """Keys as the stock model caches them with its tokens at positions start, start + 1, ..."""
    cache = tf.DynamicCache()
    positions = torch.arange(start, start + len(row)).unsqueeze(0)
    with torch.inference_mode():
        model(input_ids=torch.tensor([row]), position_ids=positions, **tiny.given(cache), use_cache=True)
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("shift", [1, 37, -9, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_rotating_a_key_by_a_delta_equals_having_been_delta_later(kind: str, shift: int) -> None:
    name, overrides = KINDS[kind]
    model, stock = tiny.build(name, **overrides), tiny.build(name, **overrides)
    facts = wrap(model, SINKS)
    assert facts.rope_kinds == ["rope", "rope"] and facts.rope is not None
    row = tiny.tokens(12)
    here, there = stock_keys(stock, row, 10), stock_keys(stock, row, 10 + shift)
    for layer in range(2):
        moved = facts.rope.rotate(here[layer], torch.tensor([[shift]]), layer)
        assert (moved - there[layer]).norm() <= 2e-5 * there[layer].norm(), f"layer {layer}"
        assert (here[layer] - there[layer]).norm() > 0.03 * there[layer].norm()


def test_gemma3_rotates_its_two_kinds_of_layers_differently() -> None:
    facts = tiny.pair("gemma3").facts
    keys = torch.ones(1, 2, 3, 8)
    assert facts.rope is not None
    sliding, full = (facts.rope.rotate(keys, torch.tensor([[5]]), layer) for layer in (0, 1))
    assert (sliding - full).abs().max() > 0.1


def test_every_token_can_have_its_own_delta() -> None:
    rope = tiny.pair("llama").facts.rope
    keys = torch.randn(2, 2, 3, 8)
    assert rope is not None
    together = rope.rotate(keys, torch.tensor([[1, 2, 3], [4, 5, 6]]), 0)
    for b in range(2):
        for n in range(3):
            alone = rope.rotate(keys[b : b + 1, :, n : n + 1], torch.tensor([[1 + n + 3 * b]]), 0)
            assert torch.allclose(together[b, :, n], alone[0, :, 0], atol=1e-6)


def test_bfloat16_sinks_are_within_one_rounding_after_4096_evictions() -> None:
    """Rotated each time from a pristine copy; in place, 4096 rotations would leave nothing of a bfloat16 key."""
    model = tiny.build("llama", max_position_embeddings=8192, num_hidden_layers=1)
    for parameter in model.parameters():  # as from_pretrained does: the frequencies, a buffer, stay float32
        parameter.data = parameter.data.bfloat16()
    pair = tiny.Pair(model, model, wrap(model, SINKS))
    n_sink, evictions = 4, 4096
    cache = pair.cache(method="streaming_llm", n_sink=n_sink, window_size=8)
    tiny.forward(model, cache, [tiny.tokens(n_sink + 8)])
    store = cache.stores[0]
    pristine = store.keys[:, :, :n_sink].double()
    newest = store.keys[:, :, -1:].clone()
    for _ in range(evictions):  # the cache's own steps, without the model around them
        cache.mode = "decode"
        (segment,), pos = cache.segments, torch.tensor([cache.seen])
        segment.begin(pos)
        step = Step(0, newest, newest, newest, pos, 1.0)
        segment._stored(step)
        segment._after_attention(step)
    assert tiny.kept(cache, 0) == [[*range(n_sink), *range(evictions + 4, evictions + 12)]]
    angles = evictions * 10_000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    a, b = pristine[..., :4], pristine[..., 4:]
    exact = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)
    error = (store.keys[:, :, :n_sink].double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_keys_have_not_drifted_after_4096_evictions(name: str, dtype: torch.dtype) -> None:
    """In the first layer a key depends on its token and its position alone, so every kept one can be made afresh."""
    model = tiny.build(name).to(dtype)
    facts = wrap(model, tiny.compression(method="streaming_llm", window_size=8))
    compression = tiny.compression(method="streaming_llm", n_sink=4, window_size=28, compress_every=32)
    cache, row = make_cache(compression, facts), tiny.tokens(32 + 4096)
    cache.mode = "decode"
    for start in range(0, len(row), 32):
        tiny.forward(model, cache, [row[start : start + 32]], [start])
    fresh = make_cache(tiny.compression(method="full"), facts)
    pos, lost = cache.stores[0].pos[0, 0].tolist(), len(row) - 32
    tiny.forward(model, fresh, [[row[p] for p in pos]])  # at positions 0, 1, ...
    at = torch.tensor([p + lost if p < 4 else p for p in pos])[None] - torch.arange(32)
    exact = facts.rope.rotate(fresh.stores[0].keys.double(), at, 0)
    error = (cache.stores[0].keys.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() <= 0.01


def test_keys_of_a_model_that_nobody_tried_are_not_moved() -> None:
    """A caller who wrapped it for another method is told, not given an index error in some layer."""
    model = tiny.build("llama")
    facts = wrap(model, FULL)
    cache = make_cache(tiny.compression(method="streaming_llm", window_size=8), facts)
    with pytest.raises(UserError, match="wrap it for the method"):
        tiny.forward(model, cache, [tiny.tokens(30)])

"""Without compression, a model under our attention says what it said before, to rounding (fp32: 1e-4 of a logit)."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as tf

from kv_lm_eval.cache import attention

LENGTHS = (40, 27, 1)  # the sliding windows of the tiny models are 24 tokens
STEPS = (40, 13, 1, 1, 30, 1)


@pytest.fixture(scope="module", params=[*tiny.CORE, "gemma2"])
def pair(request: pytest.FixtureRequest) -> tiny.Pair:
    return tiny.pair(request.param)


def generated(model: tf.PreTrainedModel, rows: list[list[int]], cache: tf.Cache, **settings: object) -> list[list[int]]:
    ids, mask, _ = tiny.left_padded(rows)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            **tiny.given(cache),
            min_new_tokens=12,
            max_new_tokens=12,
            pad_token_id=0,
            **settings,
        )
    return out[:, ids.shape[1] :].tolist()


@torch.inference_mode()
def chunked_logits(model: tf.PreTrainedModel, cache: tf.Cache) -> list[torch.Tensor]:
    """Logits of the real tokens of a left-padded batch: a prefill, chunks and single tokens."""
    ids, mask, positions = tiny.left_padded([tiny.tokens(n + sum(STEPS[1:]), seed=n) for n in LENGTHS])
    out, start = [], 0
    for step in STEPS:
        end = start + step
        logits = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            **tiny.given(cache),
        ).logits
        out.append(logits[mask[:, start:end].bool()])
        start = end
    return out


def test_logits_of_prefill_chunks_and_steps_of_a_left_padded_batch_are_the_models_own(pair: tiny.Pair) -> None:
    expected = chunked_logits(pair.stock, tf.DynamicCache(config=pair.stock.config))
    got = chunked_logits(pair.model, pair.cache(method="full"))
    for step, a, b in zip(STEPS, expected, got, strict=True):
        assert (a - b).abs().max() <= 1e-4, f"forward of {step} tokens"


@pytest.mark.parametrize("lengths", [(40,), (40, 27, 5)], ids=["one row", "left-padded rows"])
@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True}],
    ids=["greedy", "beams", "sampled"],
)
def test_generate_gives_the_models_own_tokens(
    pair: tiny.Pair, settings: dict[str, object], lengths: tuple[int, ...]
) -> None:
    rows = [tiny.tokens(n, seed=n) for n in lengths]
    torch.manual_seed(3)
    expected = generated(pair.stock, rows, tf.DynamicCache(config=pair.stock.config), **settings)
    torch.manual_seed(3)
    assert generated(pair.model, rows, pair.cache(method="full"), **settings) == expected


@pytest.mark.parametrize("elements", [1, 4000])
def test_logits_do_not_depend_on_the_size_of_the_blocks_of_queries(
    pair: tiny.Pair, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = chunked_logits(pair.stock, tf.DynamicCache(config=pair.stock.config))
    monkeypatch.setattr(attention, "MASK_ELEMENTS", elements)
    monkeypatch.setattr(attention, "WEIGHT_ELEMENTS", elements)
    got = chunked_logits(pair.model, pair.cache(method="full"))
    assert all((a - b).abs().max() <= 1e-4 for a, b in zip(expected, got, strict=True))


def test_logits_of_long_left_padded_prompts_are_the_models_own(pair: tiny.Pair) -> None:
    ids, mask, positions = tiny.left_padded([tiny.tokens(400, seed=1), tiny.tokens(90, seed=2)])
    with torch.inference_mode():
        expected = pair.stock(input_ids=ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    got = tiny.forward(pair.model, pair.cache(method="full"), [tiny.tokens(400, seed=1), tiny.tokens(90, seed=2)])
    assert (got[mask.bool()] - expected).abs().max() <= 1e-4


def test_seen_and_bytes_of_a_full_cache_are_those_of_the_prompt(pair: tiny.Pair) -> None:
    cache = pair.cache(method="full")
    tiny.forward(pair.model, cache, [tiny.tokens(20), tiny.tokens(7)])
    config = pair.model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    of_a_token = 2 * 8 * 4 * heads * config.num_hidden_layers  # keys and values, head size 8, float32
    assert cache.seen == [20, 7]
    assert cache.snapshot()["kv_bytes_valid"] == [20 * of_a_token, 7 * of_a_token]
    assert cache.snapshot()["compressed"] == [False, False]

"""Expected attention against the paper's formulas in float64, with queries from the stock model's own projections."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as tf
from methods.rotary import rotation, unrotated_queries
from methods.test_kept_sets import best, held_by

from kv_lm_eval.engine.check import wrap
from kv_lm_eval.errors import UserError

CAPACITY, SINKS, AHEAD = 15, 4, 512
SETTINGS = {"method": "expected_attention", "max_capacity_prompt": CAPACITY}


def expected(
    name: str, row: list[int], ahead: int = AHEAD, epsilon: float = 0.0, sinks: int = SINKS, queries_from: int = SINKS
) -> list[list[set[int]]]:
    """Kept positions [layer][KV head]."""
    stock, n, out = tiny.build(name), len(row), []
    config = stock.config
    turn = sum(rotation(config, p) for p in range(n, n + ahead)) / ahead
    cache = tf.DynamicCache(config=config)
    with torch.inference_mode():
        stock(input_ids=torch.tensor([row]), **tiny.given(cache), use_cache=True)
    for layer, queries in zip(cache.layers, unrotated_queries(stock, row), strict=True):
        keys, values = layer.keys[0].double(), layer.values[0].double()
        heads, kv_heads, size = len(queries), len(keys), keys.shape[-1]
        out.append([])
        for kv_head in range(kv_heads):
            weights = torch.zeros(n, dtype=torch.float64)
            for head in range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads):
                seen = queries[head, queries_from:]
                mean = sum(seen) / len(seen)
                covariance = sum(torch.outer(q - mean, q - mean) for q in seen) / len(seen)
                mean, covariance = turn @ mean, turn @ covariance @ turn.T
                logits = torch.stack([k @ mean / size**0.5 + k @ covariance @ k / (2 * size) for k in keys[kv_head]])
                weights[sinks:] += logits[sinks:].softmax(0) * kv_heads / heads
            scores = {t: float((weights[t] + epsilon) * values[kv_head, t].norm()) for t in range(sinks, n)}
            out[-1].append(best(scores, CAPACITY - sinks) | set(range(sinks)))
    return out


@pytest.mark.parametrize("name", tiny.ROPE_FULL_ATTENTION)
def test_kept_tokens_are_those_of_the_formula_in_a_padded_batch(name: str) -> None:
    pair, rows = tiny.pair(name), [tiny.tokens(n, seed=n) for n in (50, 31, 16)]
    cache = pair.cache(**SETTINGS)
    tiny.forward(pair.model, cache, rows)
    for i, row in enumerate(rows):
        assert held_by(cache, i) == expected(name, row), f"row of {len(row)} tokens"


@pytest.mark.parametrize("settings", [{"n_future_positions": 1}, {"n_sink": 0}, {"epsilon": 0.02}])
def test_each_setting_does_what_it_says(settings: dict[str, float]) -> None:
    pair, row = tiny.pair("llama"), tiny.tokens(50, seed=50)
    cache = pair.cache(**SETTINGS, **settings)
    tiny.forward(pair.model, cache, [row])
    sinks = int(settings.get("n_sink", SINKS))
    wanted = expected(
        "llama", row, int(settings.get("n_future_positions", AHEAD)), settings.get("epsilon", 0.0), sinks, sinks
    )
    assert held_by(cache) == wanted != expected("llama", row)


def test_queries_of_the_sinks_do_not_count_as_in_kvpress() -> None:
    row = tiny.tokens(50, seed=50)
    assert expected("llama", row, queries_from=0) != expected("llama", row), "the comparison would not notice"


@pytest.mark.parametrize("name", tiny.ROPE_FULL_ATTENTION)
def test_a_prompt_in_several_forwards_has_the_same_moments(name: str) -> None:
    pair, row = tiny.pair(name), tiny.tokens(50, seed=50)
    cache = pair.cache(**SETTINGS)
    for start, end in ((0, 3), (3, 20), (20, 49), (49, 50)):
        cache.mode = "hold" if end < 50 else "prefill"
        tiny.forward(pair.model, cache, [row[start:end]], starts=[start])
    assert held_by(cache) == expected(name, row)
    assert cache.stores[0].moments is None, "freed, as no further cut will come"


def test_moments_are_those_of_all_queries_so_far_and_cost_nothing_elsewhere() -> None:
    pair, row = tiny.pair("llama"), tiny.tokens(56, seed=9)
    cache = pair.cache(**SETTINGS, compress_every=3)
    tiny.forward(pair.model, cache, [row[:50], row[:30]])
    tiny.forward(pair.model, cache, [row[50:55], row[30:35]], starts=[50, 30])
    for i, n in enumerate((55, 35)):
        queries = unrotated_queries(tiny.build("llama"), row[:n])[0][:, SINKS:]
        moments = cache.segments[i].stores[0].moments
        assert moments is not None and moments.count[0] == n - SINKS
        assert (moments.mean[0] - queries.mean(1)).abs().max() < 1e-5
        for head in range(4):
            assert (moments.covariance[0, head] - queries[head].T.cov(correction=0)).abs().max() < 1e-4
    assert cache.select([1]).stores[0].moments.count.tolist() == [35 - SINKS]
    other = pair.cache(method="snapkv", window_size=4, max_capacity_prompt=15, compress_every=3)
    tiny.forward(pair.model, other, [row[:50]])
    assert other.stores[0].moments is None


def test_a_mean_far_from_zero_loses_no_digits() -> None:
    from kv_lm_eval.cache.moments import QueryMoments

    queries = torch.randn(1, 1, 4096, 4, generator=torch.Generator().manual_seed(0)) + 1000
    moments = QueryMoments.none_yet(queries)
    for part in queries.split(64, dim=2):
        moments.add(part, torch.ones(1, part.shape[2], dtype=torch.bool))
    assert (moments.covariance[0, 0] - queries[0, 0].double().T.cov(correction=0)).abs().max() < 1e-3


def test_a_model_whose_queries_cannot_be_turned_back_is_refused() -> None:
    with pytest.raises(UserError, match="method=expected_attention on GPT2LMHeadModel: its keys cannot be moved"):
        wrap(tiny.build("gpt2"), tiny.compression(**SETTINGS))


@pytest.mark.parametrize("setting", [{"n_sink": -1}, {"n_future_positions": 0}, {"epsilon": -0.5}])
def test_settings_without_sense_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        tiny.compression(**SETTINGS, **setting)

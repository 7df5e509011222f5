"""CUR against plain loops in float64 over kvpress's definition."""

from __future__ import annotations

import pytest
import tiny
from methods.plain import LENGTHS, NAMES, Layer, choose, compare, dot

from kv_lm_eval.errors import UserError

CAPACITY, SINKS, WINDOW = 15, 4, 16
CUR = {"method": "cur", "max_capacity_prompt": CAPACITY}


def shares(vectors: list[list[float]], window: int) -> list[float]:
    """Squared norms as shares of their sum over windows from the first token on; window 0: as they are."""
    squares = [dot(v, v) for v in vectors]
    if not window:
        return squares
    return [s / sum(squares[t - t % window : t - t % window + window]) for t, s in enumerate(squares)]


def reference(layer: Layer, kind: str = "kv_product", window: int = WINDOW, sinks: int = SINKS) -> list[set[int]]:
    out = []
    for head in layer.kv_heads:
        k, v = shares(layer.keys[head], window), shares(layer.values[head], window)
        scores = {"key": k, "value": v, "kv_product": [a * b for a, b in zip(k, v, strict=True)]}
        scores["kv_avg"] = [(a + b) / 2 for a, b in zip(k, v, strict=True)]
        scores = [1.0 if t < sinks else s / sum(scores[kind]) for t, s in enumerate(scores[kind])]
        out.append(choose(scores, CAPACITY))
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["kv_product", "kv_avg", "key", "value"])
def test_kept_tokens_are_those_of_kvpress_in_a_padded_batch(name, kind):
    compare(name, {**CUR, "leverage_type": kind}, lambda layer: reference(layer, kind), (*LENGTHS, 64, 33))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("window", "sinks"), [(0, 4), (7, 0), (16, 9), (1000, 2)])
def test_windows_and_sinks(name, window, sinks):
    settings = {**CUR, "local_window_size": window, "n_sink": sinks}
    compare(name, settings, lambda layer: reference(layer, window=window, sinks=sinks))


def test_with_ada_heads_compare_shares_of_all_their_tokens():
    """Without the last division heads with larger shares would take all."""
    pair, row = tiny.pair("llama"), tiny.tokens(60, seed=60)
    cache = pair.cache(**CUR, head_budget="ada", alpha=0, n_sink=0)
    tiny.forward(pair.model, cache, [row])
    from methods.plain import layers

    for layer, stock in enumerate(layers("llama", tuple(row))):
        every = []
        for head in stock.kv_heads:
            k, v = shares(stock.keys[head], WINDOW), shares(stock.values[head], WINDOW)
            products = [a * b for a, b in zip(k, v, strict=True)]
            every += [(-s / sum(products), head, t) for t, s in enumerate(products)]
        chosen = sorted(every)[: 2 * CAPACITY]
        assert tiny.kept(cache, layer) == [sorted(t for _, h, t in chosen if h == head) for head in stock.kv_heads]


@pytest.mark.parametrize("setting", [{"n_sink": -1}, {"local_window_size": -1}, {"leverage_type": "keys"}])
def test_settings_without_sense_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        tiny.compression(**CUR, **setting)

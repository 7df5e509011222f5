"""CUR against plain loops in float64 over kvpress's definition."""

from __future__ import annotations

import pytest
import tiny
from methods.plain import LENGTHS, NAMES, Layer, choose, compare, dot, later_cuts

from kv_lm_eval.errors import UserError

CAPACITY, SINKS, WINDOW, INF = 15, 4, 16, float("inf")
CUR = {"method": "cur", "max_capacity_prompt": CAPACITY}


def shares(vectors: list[list[float]], window: int) -> list[float]:
    """Squared norms as shares of their sum over windows from the first token on; window 0: as they are."""
    squares = [dot(v, v) for v in vectors]
    if not window:
        return squares
    return [s / sum(squares[t - t % window : t - t % window + window]) for t, s in enumerate(squares)]


def scores(layer: Layer, head: int, at: list[int], kind: str = "kv_product", window: int = WINDOW, sinks: int = SINKS):
    """Of a head's tokens at these positions."""
    k, v = (shares([x[head][t] for t in at], window) for x in (layer.keys, layer.values))
    own = {"key": k, "value": v, "kv_product": [a * b for a, b in zip(k, v, strict=True)]}
    own["kv_avg"] = [(a + b) / 2 for a, b in zip(k, v, strict=True)]
    return [INF if t < sinks else s / sum(own[kind]) for t, s in zip(at, own[kind], strict=True)]


def reference(layer: Layer, **settings) -> list[set[int]]:
    return [choose(scores(layer, head, list(range(layer.n)), **settings), CAPACITY) for head in layer.kv_heads]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["kv_product", "kv_avg", "key", "value"])
def test_kept_tokens_are_those_of_kvpress_in_a_padded_batch(name, kind):
    compare(name, {**CUR, "leverage_type": kind}, lambda layer: reference(layer, kind=kind), (*LENGTHS, 64, 33))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("window", "sinks"), [(0, 4), (7, 0), (16, 9), (1000, 2)])
def test_windows_and_sinks(name, window, sinks):
    settings = {**CUR, "local_window_size": window, "n_sink": sinks}
    compare(name, settings, lambda layer: reference(layer, window=window, sinks=sinks))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["kv_product", "kv_avg"])
@pytest.mark.parametrize("ada", [False, True])
def test_later_cuts_see_windows_of_what_is_left(name, kind, ada):
    """With ada, heads compare shares of all their tokens: without the last division some would take all."""
    settings = {**CUR, "leverage_type": kind, "local_window_size": 7, "n_sink": 2}
    later_cuts(name, settings, lambda *head: scores(*head, kind=kind, window=7, sinks=2), ada)


@pytest.mark.parametrize("setting", [{"n_sink": -1}, {"local_window_size": -1}, {"leverage_type": "keys"}])
def test_settings_without_sense_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        tiny.compression(**CUR, **setting)

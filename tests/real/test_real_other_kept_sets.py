"""On real weights in float64: what the methods keep whose loops read more than attention (queries, values, outputs).

The loops are those of tests/methods, over the projections of the stock model; both sides are in float64 and no token
comes twice, so there are no ties. SmolLM2 alone: the larger models take four times the memory twice.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import real_models as real
import tiny
import torch
from methods import (
    plain,
    test_compactor,
    test_criticalkv,
    test_cur,
    test_defensivekv,
    test_dropkv,
    test_every_layer,
    test_kvzip,
    test_leverage,
    test_non_causal,
    test_observed_attention,
    test_rkv,
    test_simlayer,
)
from methods.plain import Layer, choose
from methods.test_chunkkv import CHUNKKV, exact
from methods.test_criticalkv import snapkv
from methods.test_every_layer import shared

MODEL, LAYERS, SIZE = "smollm2", 30, 64  # its layers, channels of a key
LENGTHS = (50, 31)  # a padded batch
CAPACITY, WINDOW, COLUMNS = 14, 4, 16
BUDGET = {"max_capacity_prompt": CAPACITY}
VOTES = {**BUDGET, "window_size": WINDOW, "kernel_size": 3}
Reference = Callable[[Layer], list[set[int]]]


@pytest.fixture(scope="module", autouse=True)
def _real_weights() -> Iterator[None]:
    """`tiny.build` gives the real model in float64, the stock one and the wrapped one; `tiny.tokens` its words."""
    real.folder(MODEL)
    built = functools.cache(lambda which: real.stock(MODEL).double())
    first = iter(["wrapped"])
    words = list(dict.fromkeys(real.tokens(MODEL, 3000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "build", lambda name, **_: built(next(first, "stock")))
        patch.setattr(tiny, "tokens", lambda n, seed=0: words[seed : seed + n])
        patch.setattr(tiny, "pair", functools.cache(tiny.pair.__wrapped__))
        patch.setattr(plain, "layers", functools.cache(plain.layers.__wrapped__))
        yield
    test_kvzip.model.cache_clear()
    built.cache_clear()
    gc.collect()


def adakv(layer: Layer) -> list[set[int]]:
    scores = [snapkv(layer, head) for head in layer.kv_heads]
    ranked = sorted((-s, head, t) for head, own in enumerate(scores) for t, s in enumerate(own))
    chosen = [head for _, head, _ in ranked[: CAPACITY * len(scores)]]
    slots = shared([chosen.count(head) for head in layer.kv_heads], CAPACITY, "0.2", layer.n)
    return [choose(scores[head], slots[head]) for head in layer.kv_heads]


def pyramidkv(layer: Layer, i: int) -> list[set[int]]:
    """CAPACITY on average, falling in a line from the bottom to the top, whole numbers towards the mean."""
    scored = CAPACITY - WINDOW
    most = min(scored - scored // 20, layer.n - CAPACITY)  # at the bottom above the mean, at the top below it
    more = most * abs(LAYERS - 1 - 2 * i) // (LAYERS - 1)
    slots = CAPACITY + (more if 2 * i < LAYERS - 1 else -more)
    return [choose(snapkv(layer, head), slots) for head in layer.kv_heads]


def lagkv(layer: Layer) -> list[set[int]]:
    pairs = zip(layer.keys, layer.values, strict=True)
    return [test_every_layer.lagkv(keys, values, 2, 8, CAPACITY) for keys, values in pairs]


def l2_fixed(layer: Layer) -> list[set[int]]:
    """The newest half, and of the others those of the lowest norm."""
    old = layer.n - CAPACITY // 2
    return [
        choose([-plain.norm(key) for key in keys[:old]] + [math.inf] * (CAPACITY // 2), CAPACITY) for keys in layer.keys
    ]


def qfilter(layer: Layer) -> list[set[int]]:
    """The direction on which a query head's queries are longest together, by squaring their products often."""
    out = []
    for head in layer.kv_heads:
        found = []
        for own in layer.group(head):
            queries = torch.tensor(layer.queries[own], dtype=torch.float64)
            power = queries.T @ queries
            for _ in range(40):
                power = power @ power
                power /= power.norm()
            direction = power[:, power.diagonal().argmax()]
            direction /= direction.norm()
            found.append(direction if (queries @ direction).sum() > 0 else -direction)
        mean = torch.stack(found).mean(0).tolist()
        out.append(choose([plain.dot(mean, key) for key in layer.keys[head]], CAPACITY))
    return out


def critical(layer: Layer) -> list[set[int]]:
    return [
        test_criticalkv.critical(layer, head, snapkv(layer, head), test_criticalkv.CAPACITY, 0.5, 1e-4)
        for head in layer.kv_heads
    ]


def leverage(layer: Layer, i: int) -> list[set[int]]:
    """In fewer columns than there are tokens: else every token has all of its own leverage."""
    sketch = test_leverage.sketch_of(i, SIZE, COLUMNS)
    return [choose(test_leverage.leverages(keys, sketch), CAPACITY) for keys in layer.pre]


def by_layer(of: Callable[[Layer, int], list[set[int]]]) -> Reference:
    """A reference that asks for the layer's number, called for one layer after the other, row after row."""
    seen = itertools.count()
    return lambda layer: of(layer, next(seen) % LAYERS)


CASES: dict[str, tuple[dict[str, object], Reference]] = {
    "adakv": ({"method": "adakv", **VOTES}, adakv),
    "chunkkv": ({**CHUNKKV, **BUDGET}, lambda layer: exact(layer, snapkv, CAPACITY, CHUNKKV["unit_size"])),
    "compactor": ({**test_compactor.COMPACTOR, "sketch_dimension": SIZE}, test_compactor.reference),
    "criticalkv": (test_criticalkv.SNAPKV, critical),
    "cur": (test_cur.CUR, test_cur.reference),
    "defensivekv": (test_defensivekv.DEFENSIVE, test_defensivekv.reference),
    "dropkv": (test_dropkv.DROPKV, test_dropkv.reference),
    "l2_fixed": ({"method": "l2_fixed", "cache_size": CAPACITY}, l2_fixed),
    "lagkv": ({"method": "lagkv", "n_sink": 2, "lag_size": 8, **BUDGET}, lagkv),
    "leverage": ({"method": "leverage", "sketch_dimension": COLUMNS, **BUDGET}, by_layer(leverage)),
    "non_causal": (test_non_causal.NON_CAUSAL, test_non_causal.reference),
    "observed_attention": (test_observed_attention.OBSERVED, test_observed_attention.reference),
    "pyramidkv": ({"method": "pyramidkv", **VOTES}, by_layer(pyramidkv)),
    "qfilter": ({"method": "qfilter", **BUDGET}, qfilter),
    "rkv": (test_rkv.RKV, test_rkv.reference),
    "simlayer": (test_simlayer.wanted(0.5), lambda layer: test_simlayer.reference(layer, 0.5)),
}


@pytest.mark.parametrize("method", CASES)
def test_kept_sets_are_those_of_the_plain_loops(method: str) -> None:
    settings, reference = CASES[method]
    plain.compare(MODEL, settings, reference, LENGTHS if method != "dropkv" else (24,))  # its loop is cubic


def test_kvzip_keeps_what_a_repetition_looks_at() -> None:
    row = tiny.tokens(30)
    cache = test_kvzip.zipped(MODEL, [row], max_capacity_prompt=9, chunk_size=100)
    expected = test_kvzip.scores(test_kvzip.Double(MODEL), row, chunk=100)
    assert test_kvzip.held(cache, 0) == test_kvzip.best_of_all(expected, 9)

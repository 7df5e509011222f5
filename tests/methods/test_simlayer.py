"""SimLayerKV against plain loops in float64: which layers of which rows are lazy, and what they keep."""

from __future__ import annotations

import pytest
import tiny
import torch
from methods import plain
from methods.plain import NAMES, Layer, compare
from methods.test_kept_sets import held_by

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View

SINKS, WINDOW = 3, 9
LENGTHS = (60, 41, 24, 14, 13, 12)


def attention_near(layer: Layer, sinks: int = SINKS, window: int = WINDOW) -> float:
    """Of the last query to the first tokens and those right before its own, mean over all query heads."""
    near = [t for t in range(layer.n) if t < sinks or layer.n - 1 - window <= t < layer.n - 1]
    return min(1.0, sum(heads[layer.n - 1][t] for heads in layer.weights for t in near) / len(layer.weights))


def reference(layer: Layer, threshold: float, sinks: int = SINKS, window: int = WINDOW) -> list[set[int]]:
    kept = set(range(layer.n))
    if layer.n > sinks + window + 1 and attention_near(layer, sinks, window) > threshold:
        kept = set(range(sinks)) | set(range(layer.n - window + 1, layer.n))
    return [kept for _ in layer.kv_heads]


def wanted(threshold: float, **more: object) -> dict[str, object]:
    return {"method": "simlayer", "n_sink": SINKS, "window_size": WINDOW, "lazy_threshold": threshold, **more}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threshold", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1])
def test_lazy_layers_keep_first_and_recent_tokens_and_the_others_everything(name, threshold):
    compare(name, wanted(threshold), lambda layer: reference(layer, threshold), LENGTHS)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_decided_at_the_very_share(name):
    """Just under the attention that a layer has near, it is lazy; just over it, it is not."""
    row = tiny.tokens(60, seed=60)
    for i, layer in enumerate(plain.layers(name, tuple(row))):
        share = attention_near(layer)
        for threshold, lazy in ((share - 1e-4, True), (share + 1e-4, False)):
            cache = tiny.pair(name).cache(**wanted(threshold))
            tiny.forward(tiny.pair(name).model, cache, [row])
            assert len(held_by(cache)[i][0]) == (SINKS + WINDOW - 1 if lazy else 60)


def test_a_layer_with_no_more_than_the_threshold_is_not_lazy():
    """Half of the attention, to the token, lies on the first one."""
    n, x = 12, torch.zeros(1, 1, 12, 2)
    weights = torch.zeros(1, 1, 1, 1, n)
    weights[..., 0] = weights[..., 5] = 0.5
    view = View(x, x, torch.arange(n).view(1, 1, n), [n], [n], 0, 1, None, lambda last: weights)
    for threshold, goes in ((0.5, False), (0.49, True)):
        method = tiny.compression(method="simlayer", n_sink=1, window_size=3, lazy_threshold=threshold).method
        assert bool((method.score(view) == 0).any()) == goes


def test_bytes_are_those_of_what_each_prompt_keeps_and_later_cuts_go_on():
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in (60, 41, 24)]
    once, online = pair.cache(**wanted(0.35)), pair.cache(**wanted(0, compress_every=4))
    for cache in (once, online):
        tiny.forward(pair.model, cache, rows)
        held = [[len(heads[0]) for heads in held_by(cache, row)] for row in range(3)]
        assert [[own[row] for own in cache.held] for row in range(3)] == held
    assert len({n for own in once.held for n in own}) > 1
    assert online.held == [[SINKS + WINDOW - 1] * 3] * 2
    for t in range(8):
        for cache in (once, online):
            logits = tiny.forward(pair.model, cache, [[3 + t]] * 3, starts=[60 + t, 41 + t, 24 + t])
            assert logits.isfinite().all()
    assert online.held == [[SINKS + WINDOW - 1] * 3] * 2


def test_it_goes_with_treatments_of_the_rest_and_coded_pairs():
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in (60, 24)]
    for more in ({"evicted": "d2o"}, {"evicted": "compensate", "block_size": 5}, {"nbits": 4, "residual_length": 4}):
        cache = pair.cache(**wanted(0.3, **more))
        tiny.forward(pair.model, cache, rows)
        assert tiny.forward(pair.model, cache, [[3], [4]], starts=[60, 24]).isfinite().all()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_capacity_prompt": 64}, "fixed by lazy_threshold"),
        ({"threshold": 0.1}, "fixed by lazy_threshold"),
        ({"head_budget": "ada"}, "fixed by lazy_threshold"),
        ({"layer_budget": "global"}, "fixed by lazy_threshold"),
        ({"unit": "chunk"}, "with unit=chunk"),
        ({"lazy_threshold": 1.5}, r"outside \[0, 1\]"),
        ({"window_size": 0}, "at least 1 token"),
    ],
    ids=str,
)
def test_settings_without_sense_are_refused(more, words):
    with pytest.raises(UserError, match=words):
        tiny.compression(**{**wanted(0.5), **more})

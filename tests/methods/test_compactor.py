"""Compactor against plain loops in float64: both parts, centred and scaled over a layer, between its ends."""

from __future__ import annotations

import math

import pytest
import tiny
from methods import plain
from methods.plain import LENGTHS, NAMES, Layer, choose, compare, norm, pooled, softmax
from methods.test_leverage import leverages, sketch_of

from kv_lm_eval.errors import UserError

CAPACITY, START, END, SIZE = 17, 3, 2, 8
COMPACTOR = {
    **{"method": "compactor", "max_capacity_prompt": CAPACITY},
    **{"sink_size_start": START, "sink_size_end": END, "chunk_size": SIZE},
}


def attention(layer: Layer, head: int, start: int, end: int, size: int) -> list[float]:
    """Within chunks of the tokens between the first and the last ones, by these alone."""
    inner, out = list(range(start, layer.n - end)), []
    for i in range(0, len(inner), size):
        chunk = inner[i : i + size]
        total = [0.0] * len(chunk)
        for own in layer.group(head):
            for query in chunk:
                weights = softmax([layer.logit(own, query, t, scale=1.0) for t in chunk])
                total = [a + w / len(layer.group(head)) for a, w in zip(total, weights, strict=True)]
        out += [x * norm(layer.values[head][t]) for x, t in zip(total, chunk, strict=True)]
    return pooled(out, 3, "avg")


def standard(scores: list[list[float]]) -> list[list[float]]:
    every = [s for own in scores for s in own]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in every) / (len(every) - 1))
    return [[(s - mean) / max(deviation, 1e-6) for s in own] for own in scores]


def reference(
    layer: Layer, blending: float | None = None, start: int = START, end: int = END, size: int = SIZE, sketch=None
) -> list[set[int]]:
    n = layer.n
    weight = 1 - min(CAPACITY, n) / n if blending is None else blending
    geometry = standard([leverages(layer.pre[head][start : n - end], sketch) for head in layer.kv_heads])
    received = standard([attention(layer, head, start, end, size) for head in layer.kv_heads])
    out = []
    for own, got in zip(geometry, received, strict=True):
        inner = [weight * a + b for a, b in zip(own, got, strict=True)]
        out.append(choose([math.inf] * start + inner + [math.inf] * end, CAPACITY))
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, {}),
        ({"blending": 0}, {"blending": 0.0}),
        ({"blending": 2.5}, {"blending": 2.5}),
        ({"sink_size_start": 0, "sink_size_end": 0}, {"start": 0, "end": 0}),
        ({"sink_size_start": 8, "sink_size_end": 4}, {"start": 8, "end": 4}),
        ({"chunk_size": 256}, {"size": 256}),
    ],
    ids=str,
)
def test_kept_tokens_are_those_of_kvpress_in_a_padded_batch(name, settings, words):
    compare(name, {**COMPACTOR, **settings}, lambda layer: reference(layer, **words))


@pytest.mark.parametrize("name", NAMES)
def test_with_a_sketch_of_the_keys(name):
    seen = iter(range(100))
    wanted = {**COMPACTOR, "sketch_dimension": 4, "seed": 3}
    compare(name, wanted, lambda layer: reference(layer, sketch=sketch_of(next(seen) % 2, 8, 4, 3)))


def test_the_settings_show():
    layers = [x for n in LENGTHS for x in plain.layers("llama", tuple(tiny.tokens(n, seed=n)))]
    variants = [{}, {"blending": 0.0}, {"blending": 2.5}, {"start": 0}, {"end": 0}, {"size": 9}]
    assert len({str([[sorted(h) for h in reference(x, **v)] for x in layers]) for v in variants}) == len(variants)


def test_defaults_are_those_of_kvpress():
    method = tiny.compression(method="compactor", max_capacity_prompt=64).method
    got = (method.sink_size_start, method.sink_size_end, method.chunk_size, method.sketch_dimension, method.blending)
    assert got == (8, 4, 256, 48, None)


@pytest.mark.parametrize(
    "setting",
    [{"sink_size_start": -1}, {"sink_size_end": -1}, {"chunk_size": 0}, {"blending": -1}, {"sketch_dimension": 0}],
)
def test_settings_without_sense_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        tiny.compression(**{**COMPACTOR, **setting})

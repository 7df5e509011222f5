"""DropKV against what leaving out each pair really does, query by query in float64."""

from __future__ import annotations

import pytest
import tiny
from methods import plain
from methods.plain import LENGTHS, NAMES, Layer, choose, compare, dot, pooled

from kv_lm_eval.errors import UserError

CAPACITY, WINDOW, KERNEL = 16, 4, 3
DROPKV = {"method": "dropkv", "max_capacity_prompt": CAPACITY, "window_size": WINDOW, "kernel_size": KERNEL}


def reads(weights: list[float], values: list[list[float]], without: int | None = None) -> list[float]:
    """What a query reads, from all pairs or from all but one."""
    left = [t for t in range(len(values)) if t != without and weights[t]]
    total = sum(weights[t] for t in left)
    return [sum(weights[t] / total * values[t][d] for t in left) for d in range(len(values[0]))]


def reference(layer: Layer, window: int = WINDOW, kernel: int = KERNEL) -> list[set[int]]:
    out, n = [], layer.n
    for head in layer.kv_heads:
        scores, group = [0.0] * n, layer.group(head)
        for own in group:
            for query in range(n - window, n):
                weights = layer.weights[own][query]
                now = reads(weights, layer.values[head])
                for t in range(query + 1):
                    then = reads(weights, layer.values[head], without=t)
                    moved = [a - b for a, b in zip(then, now, strict=True)]
                    scores[t] += dot(moved, moved) / len(group)
        means = pooled(scores, kernel, "avg")
        out.append(choose(means[: n - window] + [float("inf")] * window, CAPACITY))
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("window", "kernel"), [(4, 3), (1, 1), (6, 7)])
def test_kept_tokens_are_those_without_which_most_would_change(name, window, kernel):
    settings = {**DROPKV, "window_size": window, "kernel_size": kernel}
    compare(name, settings, lambda layer: reference(layer, window, kernel), LENGTHS[1:])


def test_epsilon_bounds_what_a_token_with_all_attention_counts():
    """(p / (1 - p + e))^2 instead of (p / (1 - p))^2."""
    epsilon = 0.5

    def bounded(layer: Layer) -> list[set[int]]:
        out, n = [], layer.n
        for head in layer.kv_heads:
            scores, group, values = [0.0] * n, layer.group(head), layer.values[head]
            for own in group:
                for query in range(n - WINDOW, n):
                    p = layer.weights[own][query]
                    apart = [[a - b for a, b in zip(v, reads(p, values), strict=True)] for v in values]
                    for t in range(query + 1):
                        scores[t] += (p[t] / (1 - p[t] + epsilon)) ** 2 * dot(apart[t], apart[t]) / len(group)
            means = pooled(scores, KERNEL, "avg")
            out.append(choose(means[: n - WINDOW] + [float("inf")] * WINDOW, CAPACITY))
        return out

    compare("llama", {**DROPKV, "epsilon": epsilon}, bounded, (41,))
    layers = plain.layers("llama", tuple(tiny.tokens(41, seed=41)))
    assert [bounded(x) for x in layers] != [reference(x) for x in layers]


def test_defaults_are_those_of_kvpress():
    settings = tiny.compression(method="dropkv", max_capacity_prompt=64).settings()
    assert (settings["window_size"], settings["kernel_size"], settings["epsilon"]) == (32, 7, 1e-6)


@pytest.mark.parametrize("setting", [{"window_size": 0}, {"kernel_size": 4}, {"epsilon": 0}])
def test_settings_without_sense_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        tiny.compression(**{**DROPKV, **setting})

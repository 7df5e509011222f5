"""DropKV against what leaving out each pair really does, query by query in float64."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from methods import plain
from methods.plain import LENGTHS, NAMES, Layer, choose, compare, dot, later_cuts, pooled, softmax

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View

CAPACITY, WINDOW, KERNEL = 16, 4, 3
DROPKV = {"method": "dropkv", "max_capacity_prompt": CAPACITY, "window_size": WINDOW, "kernel_size": KERNEL}


def reads(weights: list[float], values: list[list[float]], without: int | None = None) -> list[float]:
    """What a query reads, from all pairs or from all but one."""
    left = [t for t in range(len(values)) if t != without and weights[t]]
    total = sum(weights[t] for t in left)
    return [sum(weights[t] / total * values[t][d] for t in left) for d in range(len(values[0]))]


def scores(layer: Layer, head: int, at: list[int], window: int = WINDOW, kernel: int = KERNEL) -> list[float]:
    """Of a head's tokens at these positions, which are all that its last queries see."""
    values, changes, group = [layer.values[head][t] for t in at], [0.0] * len(at), layer.group(head)
    for own in group:
        for place in range(len(at) - window, len(at)):
            weights = softmax([layer.logit(own, at[place], t) for t in at[: place + 1]])
            now = reads(weights, values[: place + 1])
            for i in range(place + 1):
                then = reads(weights, values[: place + 1], without=i)
                moved = [a - b for a, b in zip(then, now, strict=True)]
                changes[i] += dot(moved, moved) / len(group)
    return pooled(changes, kernel, "avg")[:-window] + [float("inf")] * window


def reference(layer: Layer, window: int = WINDOW, kernel: int = KERNEL) -> list[set[int]]:
    at = list(range(layer.n))
    return [choose(scores(layer, head, at, window, kernel), CAPACITY) for head in layer.kv_heads]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("window", "kernel"), [(4, 3), (1, 1), (6, 7)])
def test_kept_tokens_are_those_without_which_most_would_change(name, window, kernel):
    settings = {**DROPKV, "window_size": window, "kernel_size": kernel}
    compare(name, settings, lambda layer: reference(layer, window, kernel), LENGTHS[1:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ada", [False, True])
def test_later_cuts_ask_what_queries_read_of_what_is_left(name, ada):
    later_cuts(name, DROPKV, scores, ada)


def test_a_token_with_nearly_all_attention_is_told_from_one_that_queries_could_do_without():
    """In float32: |v - o|^2 is next to nothing there, and counts a million times."""
    torch.manual_seed(0)
    keys, last = torch.randn(1, 1, 12, 4), 3
    keys[0, 0, 2], keys[0, 0, 5] = torch.tensor([6.0, 0, 0, 0]), torch.tensor([0, 6.5, 0, 0])
    queries = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0], [1.7, 0.2, 0, 0]]).repeat(2, 1).view(1, 1, 2, last, 4)
    values = 1000 + torch.randn(1, 1, 12, 4)  # much in common
    weights = (queries.double() @ keys.double().unsqueeze(2).transpose(3, 4)).softmax(-1)
    assert weights.amax() > 0.999
    method = tiny.compression(method="dropkv", max_capacity_prompt=9, window_size=last, kernel_size=1).method
    view = View(keys, values, torch.arange(12).view(1, 1, 12), [12], [9], 0, 1, None, lambda last: weights.float())
    got = method.score(view)[0, 0, :-last]
    for t, score in enumerate(got.tolist()):
        wanted = 0.0
        for p in weights[0, 0, 0].tolist():
            read = [math.fsum(p[i] * values[0, 0, i, d].item() for i in range(12)) for d in range(4)]
            apart = [values[0, 0, t, d].item() - read[d] for d in range(4)]
            wanted += (p[t] / (1 - p[t] + 1e-6)) ** 2 * dot(apart, apart)
        assert score == pytest.approx(wanted, rel=0.05), t


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

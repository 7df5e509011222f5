"""Directions of queries: made-up files of the published form, and those of a prompt's own queries, in float64."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from methods.plain import NAMES, Layer, choose, compare, dot, later_cuts
from safetensors.torch import save_file

from kv_lm_eval.errors import UserError

CAPACITY = 14
QFILTER = {"method": "qfilter", "max_capacity_prompt": CAPACITY}


def strongest(vectors: list[list[float]]) -> list[float]:
    """By repeated multiplication: the unit vector on which all together are longest, on their side."""
    gram = [[dot(a, b) for b in zip(*vectors, strict=True)] for a in zip(*vectors, strict=True)]
    u = [1.0 / (1 + d) for d in range(len(gram))]
    for _ in range(3000):
        u = [dot(row, u) for row in gram]
        length = math.sqrt(dot(u, u))
        u = [x / length for x in u]
    return u if sum(dot(u, v) for v in vectors) > 0 else [-x for x in u]


def scores(layer: Layer, head: int, at: list[int], first: int = 0) -> list[float]:
    """Of a head's tokens at these positions, by the queries from `first` up to the last of them."""
    found = [strongest(layer.queries[own][first : at[-1] + 1]) for own in layer.group(head)]
    mean = [sum(x) / len(found) for x in zip(*found, strict=True)]
    return [dot(mean, layer.keys[head][t]) for t in at]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_file_directions_are_those_of_the_prompts_queries(name):
    def reference(layer: Layer) -> list[set[int]]:
        return [choose(scores(layer, head, list(range(layer.n))), CAPACITY) for head in layer.kv_heads]

    compare(name, QFILTER, reference, (60, 24))


@pytest.mark.parametrize("window", [1, 6])
@pytest.mark.parametrize("ada", [False, True])
def test_later_cuts_go_by_the_queries_since_the_last_one_and_some_before(window, ada):
    def own(layer: Layer, head: int, at: list[int]) -> list[float]:
        return scores(layer, head, at, 0 if at[-1] < 40 else at[-1] + 1 - 5 - window)

    later_cuts("llama", {**QFILTER, "window_size": window}, own, ada)


@pytest.mark.parametrize("name", NAMES)
def test_with_a_file_keys_with_the_smallest_product_stay(name, tmp_path):
    kv_heads = 2 if name == "llama" else 4
    filters = torch.randn(2, kv_heads, 8, generator=torch.Generator().manual_seed(0))
    save_file({"q_filters": filters}, tmp_path / "model.safetensors")
    seen = iter(range(100))

    def reference(layer: Layer) -> list[set[int]]:
        own = filters[next(seen) % 2].double().tolist()
        return [choose([-dot(own[head], key) for key in layer.keys[head]], CAPACITY) for head in layer.kv_heads]

    wanted = {**QFILTER, "filters": str(tmp_path / "model.safetensors")}
    compare(name, wanted, reference)
    tiny.compression(**wanted).check_model(tiny.pair(name).facts)
    assert len(tiny.compression(**wanted).settings()["filters_sha256"]) == 64


def test_files_of_another_form_or_model_are_refused(tmp_path):
    pair, path = tiny.pair("llama"), tmp_path / "model.safetensors"
    wanted = {**QFILTER, "filters": str(path)}
    with pytest.raises(UserError, match="there is no such file"):
        tiny.compression(**wanted)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="is no safetensors file"):
        tiny.compression(**wanted)
    for tensors in (
        {"w": torch.zeros(2, 2, 8)},
        {"q_filters": torch.zeros(2, 8)},
        {"q_filters": torch.full((2, 2, 8), torch.nan)},
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match="must hold one tensor q_filters"):
            tiny.compression(**wanted)
    for shape, words in (((3, 2, 8), "of 3 layers"), ((2, 4, 8), "4 KV heads")):
        save_file({"q_filters": torch.zeros(shape)}, path)
        with pytest.raises(UserError, match=words):
            tiny.compression(**wanted).check_model(pair.facts)
    save_file({"q_filters": torch.zeros(2, 2, 16)}, path)
    with pytest.raises(UserError, match="16 numbers a head"):
        tiny.forward(pair.model, pair.cache(**wanted), [tiny.tokens(30)])

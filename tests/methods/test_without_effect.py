"""Settings that do nothing, or not what they say, on this model: refused or said, with the true reason."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from kv_lm_eval.config import parse
from kv_lm_eval.errors import UserError

SLOTS = {"max_capacity_prompt": 16}


def said(name: str, **args: Any) -> str:
    return " / ".join(tiny.compression(**args).warnings(tiny.pair(name).facts))


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("llama", {"skip_layers": "0;1"}, ["skip_layers=[0, 1]", "no layer to cut", "[0, 1]", "method=full"]),
        ("llama", {"skip_layers": 2}, ["skip_layers=[2]", "from 0 to 1"]),
        ("llama", {"skip_layers": [0, 7, 9]}, ["skip_layers=[7, 9]", "no such layers"]),
        ("gemma3", {"skip_layers": [1]}, ["no layer to cut", "sliding windows"]),
        ("gemma3", {"skip_layers": [0, 1]}, ["no layer to cut", "sliding windows"]),
        ("mistral_sliding", {"skip_layers": [0, 1]}, ["no layer to cut"]),
    ],
)
def test_skip_layers_that_leave_nothing_to_cut_or_do_not_exist_are_refused(
    name: str, args: dict[str, Any], words: list[str]
) -> None:
    compression = tiny.compression(method="knorm", **SLOTS, **args)
    with pytest.raises(UserError) as caught:
        compression.check_model(tiny.pair(name).facts)
    assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(UserError):  # and when the model is wrapped for it, before anything is run
        tiny.wrap(tiny.build(name), compression)


@pytest.mark.parametrize("args", [{"method": "quantized"}, {"method": "knorm", **SLOTS, "nbits": 2}])
def test_groups_that_never_fill_are_refused(args: dict[str, Any]) -> None:
    compression = tiny.compression(**args, group_size=10**9)
    with pytest.raises(UserError, match="group_size=1000000000 is more than the 512 positions"):
        compression.check_model(tiny.pair("llama").facts)


def test_a_ring_of_more_slots_than_the_model_has_positions_is_refused() -> None:
    compression = tiny.compression(method="streaming_ring", max_capacity_prompt=10**6)
    with pytest.raises(UserError, match="takes the memory of its 1000000 slots at once"):
        compression.check_model(tiny.pair("llama").facts)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("llama", {"method": "knorm", "max_capacity_prompt": 512}, ["no less than the 512 positions", "method=full"]),
        ("llama", {"method": "window", "keep_ratio": 1}, ["keep_ratio=1 evicts nothing"]),
        ("llama", {"method": "tova", "compression_ratio": 0}, ["evicts nothing"]),
        ("llama", {"method": "knorm", "keep_ratio": 0.5, "prune_after": 600}, ["prune_after=600", "512 positions"]),
        ("llama", {"method": "snapkv", "keep_ratio": 0.05}, ["longest prompt", "25 slots", "32 always stay"]),
        ("gemma3", {"method": "knorm", **SLOTS, "skip_layers": [0]}, ["skip_layers=[0] has no effect", "sliding"]),
        ("gemma3", {"method": "pyramidkv", "max_capacity_prompt": 64}, ["layer_budget=pyramid has no effect"]),
        ("llama", {"method": "pyramidkv", "max_capacity_prompt": 64, "beta": 1}, ["layer_budget=uniform"]),
        ("llama", {"method": "knorm", **SLOTS, "layer_budget": "pyramid", "skip_layers": [1]}, ["only one layer"]),
        ("llama", {"method": "quantized", "residual_length": 600}, ["residual_length=600", "none is quantised"]),
        ("llama", {"method": "l2_fixed", "strategy": "recent_only", "recent_ratio": 0.2}, ["all are recent"]),
    ],
)
def test_what_does_nothing_is_said(name: str, args: dict[str, Any], words: list[str]) -> None:
    assert all(word in said(name, **args) for word in words), said(name, **args)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"method": "h2o", **SLOTS, "rolling_compress_every": 8}, "beside compress_every=1"),
        ({"method": "full", "rolling_compress_every": 8}, "method=full evicts nothing"),
        ({"method": "full", "tail_tokens": 4}, "tail_tokens=4 has no effect"),
        ({"method": "no_cache", "question_in_prompt": False}, "question_in_prompt=False has no effect"),
        ({"method": "knorm", **SLOTS, "rolling_compress_every": 8, "tail_tokens": 4}, ""),
        ({"method": "quantized", "tail_tokens": 4, "question_in_prompt": False}, ""),
    ],
)
def test_engine_settings_that_do_nothing_are_said(args: dict[str, Any], words: str) -> None:
    compression, engine, _ = parse(args)
    said = " / ".join(engine.warnings(compression))
    assert words in said and bool(words) == bool(said)


def test_one_kv_head_has_nothing_to_share() -> None:
    model = tiny.build("llama", num_key_value_heads=1)
    facts = tiny.wrap(model, tiny.compression(method="full"))
    compression = tiny.compression(method="knorm", **SLOTS, head_budget="ada")
    assert "one KV head" in " ".join(compression.warnings(facts))


@pytest.mark.parametrize(
    ("ratio", "after", "every"), [(0.5, 0, 1), (0.9, 0, 1), (0.9, 5, 1), (0.75, 10, 4), (0.5, 2, 8)]
)
@pytest.mark.parametrize("method", ["window", "knorm"])
def test_a_share_of_what_is_left_at_every_cut_settles_where_it_is_said_to(
    method: str, ratio: float, after: int, every: int
) -> None:
    args = {"method": method, "keep_ratio": ratio, "prune_after": after, "compress_every": every}
    compression = tiny.compression(**args)
    held = [kept for _, kept in compression.trace(60, 400, 0, [0, 1])][every::every]
    assert f"settles at {held[-1]} slots" in said("llama", **args) and held[-1] == held[-20]


@pytest.mark.parametrize(
    "args",
    [
        {"method": "knorm", "keep_ratio": 0.5, "prune_after": 20, "compress_every": 1},
        {"method": "knorm", "keep_ratio": 0.5, "prune_after": 0},
        {"method": "window", "keep_ratio": 0.5},
        {"method": "snapkv", "max_capacity_prompt": 64, "window_size": 8},
        {"method": "pyramidkv", "max_capacity_prompt": 64},
        {"method": "adakv", "keep_ratio": 0.3},
    ],
)
def test_what_does_what_it_says_is_not_warned_of(args: dict[str, Any]) -> None:
    assert not said("llama", **args)

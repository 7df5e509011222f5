"""--model_args become frozen settings, or an error that says what to do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kv_lm_eval.config import parse
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import base

SNAPKV = {"method": "snapkv", "max_capacity_prompt": 128}


def settings(**args: Any) -> dict[str, Any]:
    return parse(args)[0].settings()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, ["method=NAME", "snapkv"]),
        ({"method": "snapvk"}, ["snapvk", "did you mean 'snapkv'"]),
        ({"method": "streamingllm"}, ["'streaming_llm'"]),
        ({"method": "nosuch.py:Mine"}, ["nosuch.py", "no file"]),
        ({**SNAPKV, "kernel_sise": 5}, ["kernel_sise", "did you mean 'kernel_size'"]),
        ({**SNAPKV, "windowsize": 5}, ["'window_size'"]),
        ({"method": "knorm", "max_capacity_promt": 5}, ["'max_capacity_prompt'"]),
        ({"method": "full", "max_capacity_prompt": 5}, ["max_capacity_prompt", "full takes no settings"]),
        ({"method": "knorm", "keep_ratio": 0.5, "n_sink": 4}, ["n_sink", "knorm takes"]),
    ],
)
def test_what_is_unknown_is_named_with_its_neighbours(args: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(args, pass_through={"pretrained", "dtype"})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({**SNAPKV, "max_capacity_prompt": 64.5}, ["max_capacity_prompt=64.5", "whole number"]),
        ({**SNAPKV, "max_capacity_prompt": "many"}, ["max_capacity_prompt='many'", "whole number"]),
        ({**SNAPKV, "max_capacity_prompt": True}, ["max_capacity_prompt=True", "whole number"]),
        ({**SNAPKV, "max_capacity_prompt": float("inf")}, ["whole number"]),
        ({**SNAPKV, "max_capacity_prompt": 0}, ["max_capacity_prompt=0", "at least 1"]),
        ({**SNAPKV, "max_capacity_prompt": -5}, ["max_capacity_prompt=-5"]),
        ({**SNAPKV, "window_size": 128}, ["128", "leaves no room"]),
        ({**SNAPKV, "window_size": 200}, ["leaves no room"]),
        ({**SNAPKV, "window_size": 0}, ["window_size=0"]),
        ({**SNAPKV, "kernel_size": 6}, ["kernel_size=6", "odd", "5", "7"]),
        ({**SNAPKV, "kernel_size": 0}, ["kernel_size=0", "odd"]),
        ({**SNAPKV, "kernel_size": -3}, ["kernel_size=-3"]),
        ({**SNAPKV, "pooling": "min"}, ["pooling=min", "max, avg"]),
        ({**SNAPKV, "compress_every": -1}, ["compress_every=-1", "negative"]),
        ({"method": "h2o", "max_capacity_prompt": 16, "window_size": 16}, ["leaves no room"]),
        ({"method": "h2o", "max_capacity_prompt": 16, "window_size": -1}, ["window_size=-1"]),
        ({"method": "streaming_llm", "n_sink": -1, "window_size": 8}, ["n_sink=-1"]),
        ({"method": "streaming_llm", "n_sink": 4, "window_size": 0}, ["window_size=0"]),
        ({"method": "streaming_llm", "n_sink": 8, "max_capacity_prompt": 8}, ["leaves no room"]),
        ({"method": "streaming_llm", "window_size": 8, "positions": "relative"}, ["in_cache, absolute"]),
        ({"method": "window", "window_size": 0}, ["window_size=0"]),
        ({"method": "window", "window_size": -3}, ["window_size=-3"]),
        ({"method": "random", "max_capacity_prompt": 8, "seed": 0.5}, ["seed=0.5", "whole number"]),
        ({"method": "knorm", "keep_ratio": 0}, ["keep_ratio=0", "(0, 1]"]),
        ({"method": "knorm", "keep_ratio": 1.2}, ["keep_ratio=1.2", "(0, 1]"]),
        ({"method": "knorm", "keep_ratio": -0.5}, ["keep_ratio=-0.5"]),
        ({"method": "knorm", "keep_ratio": float("nan")}, ["keep_ratio=nan", "finite"]),
        ({"method": "knorm", "keep_ratio": "half"}, ["keep_ratio='half'", "a finite number"]),
        ({"method": "knorm", "compression_ratio": 1}, ["compression_ratio=1", "[0, 1)", "removed"]),
        ({"method": "knorm", "compression_ratio": -0.1}, ["compression_ratio=-0.1"]),
        ({"method": "knorm"}, ["needs one budget", "got none", "keep_ratio"]),
        ({"method": "streaming_llm"}, ["needs one budget", "window_size"]),
        ({"method": "knorm", "keep_ratio": 0.5, "max_capacity_prompt": 9}, ["max_capacity_prompt=9", "keep_ratio=0.5"]),
        ({"method": "knorm", "keep_ratio": 0.5, "compression_ratio": 0.5}, ["keep_ratio=0.5", "compression_ratio=0.5"]),
        ({"method": "window", "window_size": 8, "max_capacity_prompt": 9}, ["max_capacity_prompt=9", "window_size=8"]),
        ({"method": "streaming_llm", "window_size": 8, "keep_ratio": 0.5}, ["keep_ratio=0.5", "window_size=8"]),
        ({"method": "full", "tail_tokens": -1}, ["tail_tokens=-1"]),
        ({"method": "full", "tail_tokens": 1.5}, ["tail_tokens=1.5", "whole number"]),
        ({"method": "full", "rolling_compress_every": 0}, ["rolling_compress_every=0"]),
        ({"method": "full", "overlong": "ignore"}, ["overlong=ignore", "error, truncate_left"]),
        ({"method": "streaming_llm", "start_size": 4, "n_sink": 8, "window_size": 8}, ["n_sink is given twice"]),
        ({"method": "snapkv", "compression": "{not json"}, ["compression={not json", "not whole JSON"]),
        ({"method": "snapkv", "compression": "nosuch.yaml"}, ["nosuch.yaml", "neither a JSON object nor"]),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_was_got(args: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(args)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_alias_inside_compression_and_the_name_outside_it_are_the_same_setting_given_twice() -> None:
    with pytest.raises(UserError, match="n_sink is given twice"):
        parse({"method": "streaming_llm", "window_size": 8, "n_sink": 8, "compression": {"start_size": 4}})


def test_two_names_of_one_setting_inside_compression_are_refused() -> None:
    with pytest.raises(UserError, match="n_sink is given twice"):
        parse({"method": "streaming_llm", "compression": {"window_size": 8, "n_sink": 8, "start_size": 4}})


def test_a_method_named_twice_differently_is_refused() -> None:
    with pytest.raises(UserError, match="method"):
        parse({"method": "snapkv", "compression": {"method": "knorm", "max_capacity_prompt": 64}})


def test_whole_numbers_survive_the_command_lines_floats() -> None:
    got = settings(method="snapkv", max_capacity_prompt=64.0, window_size="16", kernel_size=5.0)
    assert (got["max_capacity_prompt"], got["window_size"], got["kernel_size"]) == (64, 16, 5)
    assert all(isinstance(got[k], int) for k in ("max_capacity_prompt", "window_size", "kernel_size"))


def test_names_of_the_papers_repositories_are_understood() -> None:
    assert settings(method="streaming_llm", start_size=2, recent_size=30) == settings(
        method="streaming_llm", n_sink=2, window_size=30
    )
    assert settings(
        method="snapkv", window_sizes=16, max_capacity_prompts=64, kernel_sizes=5, pooling="maxpool"
    ) == settings(method="snapkv", window_size=16, max_capacity_prompt=64, kernel_size=5, pooling="max")
    assert settings(method="snapkv", budget=64, pooling="avgpool")["pooling"] == "avg"


def test_none_means_the_default_where_there_is_one() -> None:
    assert settings(method="h2o", max_capacity_prompt=64, window_size="None")["window_size"] is None
    with pytest.raises(UserError, match="kernel_size=None"):
        parse({**SNAPKV, "kernel_size": None})


def test_presets_are_those_of_the_published_methods() -> None:
    every = {
        m: settings(method=m, max_capacity_prompt=64)["compress_every"]
        for m in ("tova", "h2o", "window", "streaming_llm")
    }
    assert every == {"tova": 1, "h2o": 1, "window": 1, "streaming_llm": 1}
    assert settings(method="snapkv", max_capacity_prompt=64)["compress_every"] == 0
    assert settings(method="knorm", max_capacity_prompt=64)["compress_every"] == 0
    assert settings(method="tova", max_capacity_prompt=64, compress_every=0)["compress_every"] == 0


def test_snapkv_defaults_are_those_of_the_longbench_configurations() -> None:
    got = settings(**SNAPKV)
    assert (got["window_size"], got["kernel_size"], got["pooling"]) == (32, 7, "max")


@pytest.mark.parametrize(("removed", "kept"), [(0, 1.0), (0.1, 0.9), (0.9, 0.1), (0.7, 0.3), (0.75, 0.25)])
def test_the_share_removed_is_one_minus_the_share_kept(removed: float, kept: float) -> None:
    assert settings(method="knorm", compression_ratio=removed)["keep_ratio"] == kept


@pytest.mark.parametrize("form", ["dict", "json", "yaml"])
def test_settings_may_come_nested(form: str, tmp_path: Path) -> None:
    nested: Any = {"method": "snapkv", "max_capacity_prompt": 64, "window_sizes": 16}
    if form == "json":
        nested = json.dumps(nested)
    if form == "yaml":
        path = tmp_path / "snap.yaml"
        path.write_text("method: snapkv\nmax_capacity_prompt: 64\nwindow_sizes: 16\n")
        nested = str(path)
    got = settings(compression=nested, kernel_size=5)
    assert (got["method"], got["max_capacity_prompt"], got["window_size"], got["kernel_size"]) == ("snapkv", 64, 16, 5)


def test_an_unknown_setting_inside_compression_is_refused_too() -> None:
    with pytest.raises(UserError, match="did you mean 'kernel_size'"):
        parse({"compression": {**SNAPKV, "kernel_siz": 5}})


def test_a_yaml_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- snapkv\n")
    with pytest.raises(UserError, match="one mapping of settings, it holds list"):
        parse({"compression": str(path)})


def test_the_rest_goes_to_the_hf_model_and_the_arguments_are_left_as_they_were() -> None:
    args = {**SNAPKV, "pretrained": "somewhere", "dtype": "float32", "tail_tokens": 2.0, "model_kwargs": {"odd": 1}}
    before = json.dumps(args)
    _, engine, rest = parse(args, pass_through={"pretrained", "dtype"})
    assert rest == {"pretrained": "somewhere", "dtype": "float32", "odd": 1}
    assert engine.tail_tokens == 2
    assert json.dumps(args) == before


def test_settings_cannot_be_changed_afterwards() -> None:
    compression, engine, _ = parse(SNAPKV)
    for part, name in [
        (compression.method, "window_size"),
        (compression.budget, "max_capacity_prompt"),
        (engine, "overlong"),
    ]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 1)


OWN_METHOD = """
from kv_lm_eval.methods.base import Method, setting

class Newest(Method):
    bias: float = setting(0.5, "nothing in particular")

    def score(self, view):
        return view.pos.float() + self.bias

class Oldest(Method):
    def score(self, view):
        return -view.pos.float()
"""


def test_a_method_of_ones_own_is_one_class_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN_METHOD)
    got = settings(method=f"{path}:Newest", max_capacity_prompt=8, bias=2)
    assert (got["bias"], got["max_capacity_prompt"], got["compress_every"]) == (2.0, 8, 0)
    with pytest.raises(UserError, match="did you mean 'Oldest'"):
        parse({"method": f"{path}:Oldset", "max_capacity_prompt": 8})
    with pytest.raises(UserError, match="must define one subclass"):
        parse({"method": str(path), "max_capacity_prompt": 8})
    with pytest.raises(UserError, match="did you mean 'bias'"):
        parse({"method": f"{path}:Newest", "max_capacity_prompt": 8, "bais": 1}, pass_through=set())


def test_a_broken_file_of_ones_own_is_reported_with_its_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nosuchmodule\n")
    with pytest.raises(UserError, match="could not be imported: ModuleNotFoundError"):
        parse({"method": str(path), "max_capacity_prompt": 8})


def test_every_bundled_method_loads_by_its_name_and_explains_its_settings() -> None:
    names = base.available()
    assert {"full", "no_cache", "snapkv", "knorm", "h2o", "tova", "random", "window", "streaming_llm"} <= set(names)
    for name in names:
        cls = base.load(name)
        assert cls.name == name
        assert all(f.metadata.get("help") for f in dataclasses.fields(cls))  # type: ignore[arg-type]

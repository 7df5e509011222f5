from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import plan

CONFIGS = Path(__file__).parents[2] / "scripts" / "configs"
TINY = sorted((CONFIGS / "tiny").glob("*.yaml"))


def points(**config: Any) -> list[dict[str, Any]]:
    return plan.points({"models": ["kv-tiny"], "tasks": ["kv_needle_magic"], **config})


def test_lists_are_the_axes_of_a_grid() -> None:
    found = points(
        vars={"capacity": [64, 128]},
        models=["kv-tiny", {"pretrained": "other", "dtype": "float32"}],
        methods=["full", {"method": "snapkv", "window_size": [8, 16], "max_capacity_prompt": "${capacity}"}],
    )
    settings = [p["settings"] for p in found if p["method"] == "snapkv" and p["model_args"]["pretrained"] == "kv-tiny"]
    assert settings == [{"window_size": w, "max_capacity_prompt": c} for w, c in itertools.product([8, 16], [64, 128])]
    assert len(found) == 2 * (1 + 4)
    assert {p["model_args"].get("dtype") for p in found if p["model_args"]["pretrained"] == "other"} == {"float32"}
    assert found[2]["name"] == "snapkv window_size=8 max_capacity_prompt=64"
    assert found[2]["axes"] == ["window_size", "max_capacity_prompt"]
    assert all("capacity" not in p["model_args"] for p in found)


@pytest.mark.parametrize("name", ["model", "batch_size", "bootstrap_iters"])
def test_a_variable_that_an_option_of_every_point_would_hide_is_refused(name: str) -> None:
    """`models: ["${model}"]` was the model `kvcompressed`."""
    with pytest.raises(UserError, match=f"`vars`: {name} is an option that every point has"):
        points(vars={name: "mine"}, models=["${model}"], methods=["full"])


def test_windows_are_capped_and_equal_points_run_once() -> None:
    found = points(
        vars={"w": [8, 16, 32]},
        methods=[
            {
                "method": "snapkv",
                "window_size": "min(${w}, ${max_capacity_prompt} // 2)",
                "max_capacity_prompt": [16, 64],
            }
        ],
    )
    assert [(p["settings"]["window_size"], p["settings"]["max_capacity_prompt"]) for p in found] == [
        (8, 16),
        (8, 64),
        (16, 64),
        (32, 64),
    ]


def test_a_methods_own_seed_is_an_axis_beside_lm_evals() -> None:
    found = points(
        methods=[{"method": "random", "max_capacity_prompt": 64, "method_seed": [0, 1, 2]}], defaults={"seed": 5}
    )
    assert [p["model_args"]["seed"] for p in found] == [0, 1, 2] and {p["seed"] for p in found} == {5}
    assert [p["name"] for p in found] == ["random seed=0", "random seed=1", "random seed=2"]
    assert found[0]["axes"] == ["seed"] and len({p["hash"] for p in found}) == 3


def test_where_leaves_points_out() -> None:
    found = points(methods=[{"method": "x", "a": [1, 2, 3], "b": [1, 2, 3], "where": "${a} < ${b}"}])
    assert [(p["settings"]["a"], p["settings"]["b"]) for p in found] == [(1, 2), (1, 3), (2, 3)]


def test_listed_points_keep_their_lists_and_may_have_their_own_tasks() -> None:
    found = points(points=[{"method": "knorm", "skip_layers": [0, 1], "tasks": "a,b", "limit": 3}, {"method": "full"}])
    assert found[0]["settings"] == {"skip_layers": [0, 1]}
    assert (found[0]["tasks"], found[0]["limit"]) == (["a", "b"], 3)
    assert found[1]["tasks"] == ["kv_needle_magic"]


def test_task_names_share_a_run_and_a_mapping_is_its_own() -> None:
    found = points(
        tasks=["a", "b", {"tasks": ["c"], "metadata": {"lengths": [256]}, "label": "short"}], methods=["full"]
    )
    assert [(p["tasks"], p["metadata"], p["label"]) for p in found] == [
        (["a", "b"], None, "a+b"),
        (["c"], {"lengths": [256]}, "short"),
    ]
    assert len({p["id"] for p in found}) == 2


def test_only_what_decides_a_number_is_in_the_hash(tmp_path: Path) -> None:
    def of(**changes: Any) -> str:
        return points(methods=[{"method": "snapkv", "max_capacity_prompt": 64, **changes}])[0]["hash"]

    base = of()
    assert of(batch_size=8) == of(name="another") == of(bootstrap_iters=0) == base
    assert (
        len({base, of(limit=3), of(device="cuda"), of(window_size=8), of(metadata={"lengths": [1]}), of(seed=1)}) == 6
    )
    text = tmp_path / "text.txt"
    text.write_text("one")
    one = of(metadata={"text_files": [str(text)]})
    text.write_text("two")
    assert of(metadata={"text_files": [str(text)]}) != one


def test_names_tell_points_apart() -> None:
    found = points(
        methods=[
            {"method": "snapkv", "max_capacity_prompt": [64, 128], "kernel_size": 5},
            {"method": "snapkv", "max_capacity_prompt": [64, 128], "kernel_size": 7},
        ]
    )
    assert len({p["name"] for p in found}) == 4
    assert found[0]["name"] == "snapkv max_capacity_prompt=64 kernel_size=5"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": ["full"]}, "did you mean 'methods'"),
        ({}, "nothing to run"),
        ({"methods": "full"}, "must be a list"),
        ({"methods": ["full"], "tasks": []}, "has no tasks"),
        ({"methods": ["full"], "models": []}, "has no model"),
        ({"methods": [{"method": "x", "a": []}]}, "empty list"),
        ({"methods": [{"method": "x", "a": "${b}"}]}, "is not defined"),
        ({"methods": [{"method": "x", "where": "yes or no"}]}, "no comparison"),
        ({"methods": ["full"], "tasks": [{"limit": 3}]}, "needs `tasks"),
    ],
)
def test_mistakes_are_told(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        points(**config)


def test_a_name_is_a_text_and_not_a_sum() -> None:
    found = points(methods=[{"method": "streaming_llm", "window_size": [60, 124], "name": "4 + ${window_size}"}])
    assert [p["name"] for p in found] == ["4 + 60", "4 + 124"]


def test_a_bad_point_stops_the_plan_with_its_name() -> None:
    found = points(methods=["full", {"method": "snapkv", "max_capacity_prompt": [8, 64], "window_size": 16}])
    with pytest.raises(UserError, match=r"^[^\n]*max_capacity_prompt=8: .*window_size.*; nothing was started$"):
        plan.check(found)
    with pytest.raises(UserError, match="no task 'kv_needle_magik'"):
        plan.check(points(methods=["full"], tasks=["kv_needle_magik"]))


@pytest.mark.parametrize("file", TINY, ids=lambda file: file.stem)
def test_shipped_tiny_configurations_can_run(file: Path) -> None:
    _, found = plan.load(file)
    plan.check(found)
    assert any(p["method"] == "full" for p in found)
    assert (CONFIGS / file.name).is_file(), "each has a full form"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_full_configurations_can_run(file: Path) -> None:
    _, found = plan.load(file)
    needs_a_profile = [p for p in found if "profile" in p["settings"]]
    plan.check([p for p in found if p not in needs_a_profile])
    assert (CONFIGS / "tiny" / file.name).is_file(), "each has a tiny form"


def test_presets_that_tell_tasks_other_things_are_other_points() -> None:
    """Equal points are run once; these two have the same settings of the model."""
    names = ["leaderboard/snapkv", "leaderboard/snapkv_query_aware"]
    config = {"models": ["kv-tiny"], "tasks": ["kv_ruler_vt"], "methods": [{"preset": names, "keep_ratio": 0.5}]}
    first, second = plan.points(config)
    assert first["hash"] != second["hash"] and {first["method"], second["method"]} == {"snapkv"}
    assert [p["model_args"]["preset"] for p in (first, second)] == names

"""What a sweep, the tuner and the baselines have kept is used for the same models, methods and tasks only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kv_lm_eval import tiny
from kv_lm_eval.experiments import baselines, plan, task_files, tune
from kv_lm_eval.experiments import scores as scores_of

METHOD = """
from kv_lm_eval.methods.base import Method, View

class Newest(Method):
    def score(self, view: View):
        return view.positions.float()
"""
TASK = {
    "task": "own_task",
    "include": "shared.txt",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "train",
    "doc_to_target": "a",
}
SHARED = "doc_to_text: !function words.prompt\ngeneration_kwargs: {until: []}\n"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Everything that a run may be made of, in files."""
    shutil.copytree(tiny.path(), tmp_path / "model")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = {"dataset_kwargs": {"data_files": {"train": str(tmp_path / "data.jsonl")}}}
    (tasks / "own.yaml").write_text(yaml.safe_dump({**TASK, **data}))
    (tasks / "group.yaml").write_text(yaml.safe_dump({"group": "own_group", "task": ["own_task"]}))
    (tasks / "shared.txt").write_text(SHARED)
    (tasks / "words.py").write_text("def prompt(doc):\n    return doc['q']\n")
    (tmp_path / "data.jsonl").write_text('{"q": "1", "a": "2"}\n')
    (tmp_path / "method.py").write_text(METHOD)
    (tmp_path / "text.txt").write_text("one")
    return tmp_path


def swap(name: str, old: str, new: str) -> Callable[[Path], Any]:
    return lambda world: (world / name).write_text((world / name).read_text().replace(old, new))


EDITS: dict[str, Callable[[Path], Any]] = {
    "the method's file": swap("method.py", ".float()", ".double()"),
    "weights": lambda w: (w / "model" / "model.safetensors").write_bytes(b"x"),
    "weights in another format": lambda w: (w / "model" / "pytorch_model.bin").write_bytes(b"x"),
    "tokenizer": swap("model/tokenizer_config.json", "{", '{"add_bos_token": true, '),
    "template": lambda w: (w / "model" / "chat_template.jinja").write_text("{{ messages }}"),
    "generation defaults": swap("model/generation_config.json", "{", '{"repetition_penalty": 1.5, '),
    "the task's YAML": swap("tasks/own.yaml", "doc_to_target: a", "doc_to_target: q"),
    "an included YAML": swap("tasks/shared.txt", "until: []", "until: ['.']"),
    "a function beside it": swap("tasks/words.py", "doc['q']", "doc['a']"),
    "its data": swap("data.jsonl", '"2"', '"3"'),
    "a file of the metadata": swap("text.txt", "one", "two"),
}


def point(world: Path, tasks: str = "own_task") -> str:
    (only,) = plan.points(
        {
            "defaults": {"include_path": str(world / "tasks"), "metadata": {"text_files": [str(world / "text.txt")]}},
            "models": [str(world / "model")],
            "tasks": [tasks],
            "methods": [{"method": f"{world / 'method.py'}:Newest", "max_capacity_prompt": 16}],
        }
    )
    return str(only["hash"])


def tuned(world: Path) -> str:
    arguments = ["--model_args", f"pretrained={world / 'model'},method={world / 'method.py'}:Newest", "--budgets", "16"]
    arguments += ["--tasks", "own_task", "--include_path", str(world / "tasks"), "--metadata"]
    arguments += [json.dumps({"text_files": [str(world / "text.txt")]})]
    scores: Any = object.__new__(scores_of.Scores)
    scores.args, scores._keys = tune._parser().parse_args(arguments), {}
    scores.args.metadata = scores_of._metadata(scores.args.metadata)
    base = {"pretrained": str(world / "model"), "method": f"{world / 'method.py'}:Newest", "max_capacity_prompt": 16}
    return str(scores._key(base, "own_task"))


@pytest.mark.parametrize("edit", EDITS)
def test_whatever_a_point_is_made_of_makes_it_another_point_when_it_is_edited(edit: str, world: Path) -> None:
    before = point(world), point(world, "own_group"), tuned(world)
    assert before == (point(world), point(world, "own_group"), tuned(world))
    EDITS[edit](world)
    after = point(world), point(world, "own_group"), tuned(world)
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_what_a_tuner_does_with_scores_is_not_in_their_key(world: Path) -> None:
    names = {action.dest for action in tune._parser()._actions} - {"help"}
    assert scores_of._NOT_DECIDING <= names
    assert names - scores_of._NOT_DECIDING == {
        "metadata",
        "num_fewshot",
        "apply_chat_template",
        "metric",
        "score_range",
    }


def test_our_tasks_are_known_with_the_code_that_scores_them() -> None:
    (qasper,) = task_files.of(["kv_longbench_qasper"]).values()
    assert {"qasper.yaml", "_common.yml"} == {name for name, _ in qasper["yaml"]}
    assert "longbench_tasks/metrics/qa_f1.py" in {name for name, _ in qasper["code"]}
    assert "kv_longbench_qasper" in task_files.of(["kv_longbench"])
    assert "kv_needle_vt" in task_files.of(["kv_needle_*"])


def test_a_baseline_belongs_to_its_weights(tmp_path: Path) -> None:
    shutil.copytree(tiny.path(), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The boats lay still in the harbour of the town. " * 8)
    setup = baselines.load(str(tmp_path / "model"), "files", text_files=[str(text)], dtype="float32", device="cpu")
    before = setup.key(8)
    assert setup.key(8) == before
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    assert {name for name in before if setup.key(8)[name] != before[name]} == {"identity"}

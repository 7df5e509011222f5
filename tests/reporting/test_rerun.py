"""The commands on the page: what they ask for is what was recorded, and they give the same numbers."""

from __future__ import annotations

import html as escapes
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from results import FULL, mean_task, planned, point, run, snapkv

from kv_lm_eval import cli
from kv_lm_eval.reporting import load, page, rerun, rows
from kv_lm_eval.reporting.cells import Row
from kv_lm_eval.reporting.run import Run

ROOT = Path(__file__).parents[2]
TASK = {"one": mean_task([1.0, 0.0])}


def only_line(folder: Path) -> str:
    (found,) = load.read(folder).runs
    (line,) = rerun.lines(found)
    return line


def options(line: str) -> dict[str, str]:
    """--name value of a command line, as a shell splits it."""
    words = shlex.split(line)
    assert words[:2] == ["kv-lm-eval", "run"]
    out: dict[str, str] = {}
    for word in words[2:]:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            out[name] = value
        else:
            out[name] += word
    return out


def test_everything_that_decides_a_number_is_asked_for(tmp_path):
    run(
        tmp_path,
        snapkv(),
        TASK,
        limit=5.0,
        batch_size="8",
        device="cpu",
        gen_kwargs={"temperature": 0, "until": ["\n", "'"]},
        metadata={"lengths": [256], "note": "it's"},
        top={
            "chat_template": "{{ messages }}",
            "system_instruction": 'You\'re "brief".\n-- always',
            "fewshot_as_multiturn": False,
            "n-shot": {"one": 3},
        },
        random_seed=1,
        numpy_seed=2,
        torch_seed=None,
        fewshot_seed=4,
    )
    found = options(only_line(tmp_path))
    assert json.loads(found.pop("gen_kwargs")) == {"temperature": 0, "until": ["\n", "'"]}
    assert json.loads(found.pop("metadata")) == {"lengths": [256], "note": "it's"}
    assert found == {
        "model": "kvcompressed",
        "model_args": "pretrained=models/toy,method=snapkv",
        "tasks": "one",
        "num_fewshot": "3",
        "apply_chat_template": "",
        "fewshot_as_multiturn": "false",
        "system_instruction": 'You\'re "brief".\n-- always',
        "limit": "5",
        "batch_size": "8",
        "device": "cpu",
        "seed": "1,2,None,4",
    }


def test_a_sweeps_point_is_asked_for_as_it_was_planned(tmp_path):
    settings = {"apply_chat_template": "short", "num_fewshot": 2, "limit": 0.25, "seed": 7, "include_path": "my tasks"}
    settings |= {"metadata": {"lengths": [256]}, "system_instruction": "-x", "max_batch_size": 4}
    point(tmp_path / "p", "p", "failed", snapkv(), ["one", "two"], None, **settings)
    found = options(only_line(tmp_path))
    assert json.loads(found.pop("metadata")) == {"lengths": [256]}
    assert found["tasks"] == "one,two" and found["apply_chat_template"] == "short" and found["limit"] == "0.25"
    assert found["seed"] == "7,7,7,7" and found["include_path"] == "my tasks" and found["max_batch_size"] == "4"
    assert found["system_instruction"] == "-x" and "--system_instruction=-x" in only_line(tmp_path)


ARGUMENTS = [
    {"pretrained": "kv-tiny", "method": "full"},
    {"pretrained": 'a folder/it\'s "here" $HOME `x` \\ é 中', "method": "full"},
    {"pretrained": "m", "a": None, "b": True, "c": False, "d": -1, "e": 1, "f": 1.0, "g": 1e-7, "h": "1", "i": "1e3"},
    {"pretrained": "m", "a": "None", "b": "true", "c": "", "d": "x=y", "e": "a,b", "f": " ", "g": "1_000", "h": "()"},
    {"pretrained": "m", "compression": {"method": "snapkv", "deep": {"er": [1, None, "'"]}}, "list": ["a", 2]},
    {"pretrained": "m", "text": "half \ud83d", "newline": "a\nb", "dash": "-x", "star": "*?[]{}~!#&;<>|()"},
    {"pretrained": "m", "odd key": 1},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_of_any_type_come_back_as_they_were(tmp_path, arguments):
    from lm_eval._cli import HarnessCLI

    run(tmp_path, FULL, TASK, model_args=arguments, gen_kwargs=dict(list(arguments.items())[1:]))
    line = only_line(tmp_path)
    line.encode()
    shell = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    words = shell.stdout.decode().rstrip("\0").split("\0")
    assert words == shlex.split(line)
    asked = HarnessCLI()._parser.parse_args(words[1:])
    assert asked.model_args == arguments
    types = {k: type(v) for k, v in asked.model_args.items()}
    assert types == {k: type(v) for k, v in arguments.items()}
    assert (asked.gen_kwargs or {}) == dict(list(arguments.items())[1:])


def test_a_text_of_arguments_is_read_as_lm_eval_reads_it(tmp_path):
    from lm_eval._cli.utils import key_val_to_dict
    from lm_eval.utils import simple_parse_args_string

    text = "pretrained=m,method=full,max_length=64,trust_remote_code=True,x=None,y=-1,z=1e3,w=a=b"
    run(tmp_path, FULL, TASK, model_args=text)
    again = options(only_line(tmp_path))["model_args"]
    asked = json.loads(again) if again.startswith("{") else key_val_to_dict(again)
    assert asked == simple_parse_args_string(text) and type(asked["y"]) is int


def test_tasks_with_other_numbers_of_examples_are_commands_of_their_own(tmp_path):
    tasks = {name: mean_task([1.0, 0.0]) for name in ("one", "two", "three")}
    run(tmp_path, FULL, tasks, top={"n-shot": {"one": 0, "two": 5, "three": 0}})
    (found,) = load.read(tmp_path).runs
    asked = [options(line) for line in rerun.lines(found)]
    assert [(o["tasks"], o["num_fewshot"]) for o in asked] == [("one,three", "0"), ("two", "5")]


def test_chosen_documents_are_asked_for(tmp_path):
    run(
        tmp_path,
        FULL,
        {"one": mean_task([1.0, 0.0], docs=[3, 8])},
        top={"n-samples": {"one": {"original": 20, "effective": 2}}},
    )
    assert json.loads(options(only_line(tmp_path))["samples"]) == {"one": [3, 8]}


def test_tasks_of_the_users_own_are_found_again(tmp_path):
    source = {"config_source": "/home/me/my tasks/one.yaml"}
    run(tmp_path, FULL, TASK, top={"configs": {"one": {"metadata": source, "unsafe_code": True}}})
    found = options(only_line(tmp_path))
    assert found["include_path"] == "/home/me/my tasks" and found["confirm_run_unsafe_code"] == ""


def test_a_model_object_has_no_command(tmp_path):
    run(tmp_path, FULL, TASK, top={"model_source": "CUSTOM"})
    assert only_line(tmp_path).startswith("# run from Python")


def test_planned_points_have_commands_too():
    line = rerun.lines(Run({}, None, planned("p", "p", snapkv(), ["one"]), "planned"))
    assert line == ["kv-lm-eval run --model kvcompressed --model_args pretrained=models/toy,method=snapkv --tasks one"]


FIRST = [
    "--model=kvcompressed",
    "--tasks=kv_needle_magic",
    '--metadata={"lengths": [256], "depths": [10, 90], "samples_per_cell": 2}',
    '--model_args={"pretrained": "kv-tiny", "method": "snapkv", "max_capacity_prompt": 64, "max_length": null}',
    "--gen_kwargs=max_gen_toks=5",
    "--seed=3",
    "--batch_size=2",
    "--log_samples",
]


def test_the_command_on_the_page_gives_the_same_numbers(tmp_path, monkeypatch):
    first, again = tmp_path / "first", tmp_path / "again"
    monkeypatch.setattr(sys, "argv", ["kv-lm-eval"])
    assert cli.main(["run", *FIRST, f"--output_path={first}"]) == 0
    text = page.page(rows.report(*load.read(first)), [], [], first, "t")
    line = escapes.unescape(re.search(r"<pre>\n(kv-lm-eval .*?)</pre>", text, re.S)[1])
    program = tmp_path / "kv-lm-eval"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m kv_lm_eval "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    shell = ["bash", "-c", f"{line} --log_samples --output_path {shlex.quote(str(again))}"]
    done = subprocess.run(shell, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    numbers = []
    for folder in (first, again):
        (found,) = load.read(folder).runs
        given = [sample.answer for sample in Row([found]).samples("kv_needle_magic", "none").values()]
        numbers.append((found.tasks, given, found.task_stats("kv_needle_magic")["kept_fraction_mean"]))
    assert numbers[0] == numbers[1] and len(numbers[0][1]) == 4

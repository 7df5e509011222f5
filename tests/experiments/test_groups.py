"""Points that differ in their method alone are run together: one prefill a prompt, and the files of runs one by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kv_lm_eval.engine import prefill
from kv_lm_eval.experiments import run_group, run_point, sweep

ROOT = Path(__file__).parents[2]
METHODS: list[Any] = [
    "full",
    {"method": "snapkv", "window_size": 16, "max_capacity_prompt": [64, 100]},
    {"method": "snapkv", "window_size": 16, "max_capacity_prompt": 64, "evicted": "d2o", "nbits": 4, "group_size": 16},
    {"method": "streaming_llm", "n_sink": 4, "window_size": 60, "compress_every": 3},
    {"method": "adakv", "window_size": 16, "max_capacity_prompt": 64},
    {"method": "random", "max_capacity_prompt": 64},
]
CONFIG: dict[str, Any] = {
    "defaults": {
        "dtype": "float64",
        "device": "cpu",
        "batch_size": 2,
        "bootstrap_iters": 2,
        "metadata": {"lengths": [192], "depths": [50], "samples_per_cell": 3},
    },
    "models": ["kv-tiny"],
    "tasks": ["kv_needle_magic", "kv_quickstart_choice"],
    "methods": METHODS,
}
TIMES = ("ttft_s", "tpot_s", "total_s", "compression_s", "tokens_per_s", "decode_tokens_per_s", "warm_up", "batch_size")
PEAKS = ("prefill_peak_bytes", "decode_peak_bytes", "new_tokens")


def run(folder: Path, *arguments: str, **changes: Any) -> tuple[int, Path]:
    """The sweep's status and its folder."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return sweep.main([str(config), "--output_path", str(folder / "out"), *arguments]), folder / "out"


def table(output: Path) -> dict[str, Any]:
    """By point: all that is known of it but times."""
    found = {}
    for point in json.loads((output / "plan.json").read_text())["points"]:
        folder = output / "points" / point["id"]
        record = run_point.read_record(folder)
        assert run_point.why_not_done(record, folder) is None, (folder / "log.txt").read_text()[-3000:]
        left = {file.suffix for file in folder.rglob("*") if file.is_file()}
        assert not {".db", ".part"} & left and not (folder / "requests.jsonl").exists(), left
        (results,) = folder.rglob("results_*.json")
        told = json.loads(results.read_text())
        samples = []
        for file in sorted(folder.rglob("samples_*.jsonl")):
            for line in file.read_text().splitlines():
                sample = json.loads(line)
                kept = [{k: v for k, v in one.items() if k not in TIMES + PEAKS} for one in sample["efficiency"]]
                samples.append((sample["doc_id"], sample["resps"], sample["target"], kept))
        stats = dict(told["config"]["kv_stats"])
        for one in (stats, *stats["by_task"].values()):
            one.pop("efficiency", None)
        found[point["name"]] = rounded((told["results"], stats, sorted(samples, key=repr)))
    return found


def rounded(value: Any) -> Any:
    """Numbers to ten figures: forwards of other shapes may round otherwise."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items() if k not in ("name", "alias")}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    status, output = run(tmp_path_factory.mktemp("apart"), "--one-by-one")
    assert status == 0
    return table(output)


def test_together_they_write_what_they_write_one_by_one_from_one_prefill(
    one_by_one: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    read = []
    original = prefill.forward

    def forward(model: Any, cache: Any, rows: Any, *more: Any, **words: Any) -> Any:
        read.append(sum(len(row) for row in rows if len(row) > 64))
        return original(model, cache, rows, *more, **words)

    monkeypatch.setattr(prefill, "forward", forward)
    status, output = run(tmp_path)
    assert status == 0
    found = table(output)
    assert found.keys() == one_by_one.keys()
    for name, one in one_by_one.items():
        assert found[name] == one, name
    prompts = sum(one["prompt_tokens"] for one in (s[3][0] for s in found["full"][2]))
    assert 0.99 * prompts < sum(read) <= prompts  # once for all; a choice's last token is fed after the cut


KILLED = """
import os, signal, sys
from kv_lm_eval.experiments import run_group, run_point, sweep

class Killed(run_point.KeptLog):
    def add_batch(self, *batch, **more):
        super().add_batch(*batch, **more)
        if "random" in str(self.file) and len(self.records) >= int(os.environ["AT"]):
            os.kill(os.getpid(), signal.SIGKILL)

run_group.KeptLog = run_point.KeptLog = Killed
sweep.main(sys.argv[1:])
"""


@pytest.mark.parametrize("at", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_group_that_is_killed_goes_on_to_the_same_files(at: int, one_by_one: dict[str, Any], tmp_path: Path) -> None:
    config, output, methods = tmp_path / "config.yaml", tmp_path / "out", ["full", *METHODS[3:]]
    config.write_text(yaml.safe_dump({**CONFIG, "methods": methods}))
    command = [sys.executable, "-c", KILLED, str(config), "--output_path", str(output)]
    killed = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), "AT": str(at)}, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    kept = list((output / "points").glob("*/requests.jsonl"))
    assert len(kept) == 4  # of every point, begun or not
    status, output = run(tmp_path, methods=methods)
    assert status == 0
    for name, (scores, _, samples) in table(output).items():
        name = name if name in one_by_one else f"{name} max_capacity_prompt=64"
        assert scores == one_by_one[name][0]
        assert [s[:3] for s in samples] == [s[:3] for s in one_by_one[name][2]]


BROKEN = '''
import torch
from kv_lm_eval.methods.base import Method


class Broken(Method):
    """Scores everything NaN."""

    def score(self, view):
        return torch.full_like(view.keys[..., 0], float("nan"))
'''


def test_a_point_that_fails_takes_no_other_along(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    methods = [METHODS[1], {"method": f"{tmp_path}/broken.py:Broken", "max_capacity_prompt": 32}, METHODS[5]]
    status, output = run(tmp_path, methods=methods, tasks=["kv_needle_magic"])
    assert status == 1
    records = {}
    for point in json.loads((output / "plan.json").read_text())["points"]:
        records[point["name"]] = run_point.read_record(output / "points" / point["id"])
    statuses = [record["status"] for record in records.values()]
    assert statuses == ["done", "done", "failed", "done"]
    assert "NaN" in list(records.values())[2]["error"]


def points(*changed: dict[str, Any]) -> list[Any]:
    base = {"model": "kvcompressed", "tasks": ["t"], "model_args": {"pretrained": "m", "method": "full"}}
    return [({**base, **one}, Path(str(i))) for i, one in enumerate(changed)]


def test_groups_are_points_that_differ_in_their_method_alone() -> None:
    snapkv = {"pretrained": "m", "method": "snapkv", "max_capacity_prompt": 64}
    jobs = points(
        {},
        {"model_args": snapkv},
        {"model_args": {**snapkv, "dtype": "float32"}},  # loaded otherwise
        {"model_args": {**snapkv, "question_in_prompt": False}},  # other heads are compressed
        {"model_args": {"pretrained": "m", "method": "full", "question_in_prompt": False}},  # which is full
        {"limit": 3},
        {"model_args": {"pretrained": "m", "method": "no_cache"}},
        {"model": "hf"},
        {"tasks": ["u"]},
    )
    found = [[int(str(folder)) for _, folder in group] for group in run_group.groups(jobs)]
    assert found == [[0, 1, 4], [2], [3], [5], [6], [7], [8]]


def test_groups_are_halved_for_as_many_processes_as_there_are() -> None:
    snapkv = {"pretrained": "m", "method": "snapkv"}
    jobs = points(*[{"model_args": {**snapkv, "max_capacity_prompt": 64 + i}} for i in range(7)])
    assert [len(group) for group in run_group.groups(jobs)] == [7]
    assert [len(group) for group in run_group.groups(jobs, at_least=2)] == [4, 3]
    assert [len(group) for group in run_group.groups(jobs, at_least=3)] == [2, 2, 3]
    assert [len(group) for group in run_group.groups(jobs, at_least=9)] == [1] * 7

"""Whole sweeps on kv-tiny: skipped, resumed after SIGKILL, failing, under Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kv_lm_eval.experiments import run_point, sweep

ROOT = Path(__file__).parents[2]

CONFIG: dict[str, Any] = {
    "defaults": {
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 2,
        "metadata": {"lengths": [256], "depths": [10, 90], "samples_per_cell": 4},
    },
    "models": ["kv-tiny"],
    "tasks": ["kv_needle_magic"],
    "methods": ["full", {"method": "snapkv", "window_size": 16, "max_capacity_prompt": [64, 128]}],
}


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return file


def read(output: Path) -> list[dict[str, Any]]:
    """Of each point in the plan's order: record, results, samples."""
    out = []
    for point in json.loads((output / "plan.json").read_text())["points"]:
        folder = output / "points" / point["id"]
        record = json.loads((folder / "point.json").read_text())
        if record["status"] == "done":
            (results,) = folder.rglob("results_*.json")
            assert results == folder / record["results_file"]
            (samples,) = folder.rglob("samples_*.jsonl")
            record["results"] = json.loads(results.read_text())
            record["samples"] = [json.loads(line) for line in samples.read_text().splitlines()]
        out.append(record)
    return out


def table(records: list[dict[str, Any]]) -> list[Any]:
    """What must not depend on how a sweep was run: settings, answers, scores, what was compressed."""
    rows = []
    for record in records:
        stats = dict(record["results"]["config"]["kv_stats"])
        stats = {k: stats[k] for k in ("requests", "compressed_share", "kept_fraction_mean", "kv_bytes_prefill_mean")}
        answers = sorted((s["doc_id"], s["resps"][0][0], s["contains"]) for s in record["samples"])
        rows.append(
            (record["settings"], record["results"]["results"]["kv_needle_magic"]["contains,none"], stats, answers)
        )
    return rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert sweep.main([str(write(folder)), "--output_path", str(folder / "out")]) == 0
    return folder


def test_points_are_normal_runs_and_finished_ones_are_skipped(undisturbed: Path, capsys: Any) -> None:
    output = undisturbed / "out"
    records = read(output)
    assert [r["status"] for r in records] == ["done"] * 3
    assert [r["name"] for r in records] == ["full", "snapkv max_capacity_prompt=64", "snapkv max_capacity_prompt=128"]
    full, small, _ = (r["results"] for r in records)
    assert full["config"]["model"] == small["config"]["model"] == "kvcompressed"
    assert small["config"]["model_args"]["max_capacity_prompt"] == 64
    assert small["config"]["kv_stats"]["compressed_share"] == 1 > full["config"]["kv_stats"]["compressed_share"]
    assert full["n-samples"]["kv_needle_magic"]["effective"] == 8
    files = [file for file in (output / "points").rglob("*") if file.is_file() and file.name != "point.json"]
    before = {file: file.stat().st_mtime_ns for file in files}
    renamed = write(undisturbed, methods=[{"method": "full", "name": "everything"}, *CONFIG["methods"][1:]])
    assert sweep.main([str(renamed), "--output_path", str(output)]) == 0
    assert "3 finished before, 0 to run" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in before} == before
    renamed_only = [{**r, "name": "everything"} if r["method"] == "full" else r for r in records]
    assert read(output) == renamed_only


def test_dry_run_shows_the_plan_and_runs_nothing(undisturbed: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    assert sweep.main([str(write(tmp_path)), "--output_path", str(output), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not output.exists()
    assert "3 points, 0 done, 3 to do" in said and "time not known" in said
    more = write(tmp_path, methods=[*CONFIG["methods"], {"method": "random", "max_capacity_prompt": 64}])
    assert sweep.main([str(more), "--output_path", str(undisturbed / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 points, 3 done, 1 to do" in said and re.search(r"random.* to do +8 +[\d,]+ +~\d", said)


KILLED = """
import os, signal, sys
from kv_lm_eval.experiments import run_point, sweep

class Killed(run_point.KeptLog):
    def add_batch(self, *batch, **more):
        super().add_batch(*batch, **more)
        if "snapkv" in str(self.file) and len(self.records) == 6:
            os.kill(os.getpid(), signal.SIGKILL)

run_point.KeptLog = Killed
sweep.main(sys.argv[1:])
"""


def test_a_killed_sweep_loses_nothing_and_repeats_nothing(undisturbed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    output, config = tmp_path / "out", write(tmp_path)
    arguments = [str(config), "--output_path", str(output), "--one-by-one"]
    command = [sys.executable, "-c", KILLED, *arguments]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    done, half = sorted((output / "points").iterdir())
    assert run_point.read_record(done)["status"] == "done" and run_point.read_record(half)["status"] == "running"
    untouched = {file: file.stat().st_mtime_ns for file in done.rglob("*") if file.is_file()}

    ran: list[str] = []
    original = run_point.run_point
    noted = lambda point, folder: ran.append(point["name"]) or original(point, folder)  # noqa: E731
    monkeypatch.setattr("kv_lm_eval.experiments.run_group.run_point", noted)
    assert sweep.main(arguments) == 0
    assert ran == ["snapkv max_capacity_prompt=64", "snapkv max_capacity_prompt=128"]
    assert {file: file.stat().st_mtime_ns for file in untouched} == untouched
    records = read(output)
    assert [r["resumed"] for r in records] == [False, True, False]
    assert not list(half.glob("answers*")) and not list(half.glob("requests*"))
    cached = re.findall(r"Cached requests: (\d+), Requests remaining: (\d+)", (half / "log.txt").read_text())
    assert cached[0] == ("0", "8") and int(cached[1][0]) >= 2 and sum(map(int, cached[1])) == 8
    assert table(records) == table(read(undisturbed / "out"))


def test_failures_are_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    methods = [
        {"method": "full", "max_length": 100},  # the prompts do not fit
        {"method": "random", "max_capacity_prompt": 64},
        {"method": "random", "max_capacity_prompt": 32},
    ]
    original = run_point._evaluate

    def evaluate(point: dict[str, Any], folder: Path, lm: Any = None) -> list[Path]:
        if point["settings"].get("max_capacity_prompt") == 64:
            try:
                raise torch.OutOfMemoryError("no room")
            except torch.OutOfMemoryError as error:
                raise RuntimeError("a library's own words") from error
        return original(point, folder, lm)

    monkeypatch.setattr(run_point, "_evaluate", evaluate)
    output, config = tmp_path / "out", write(tmp_path, methods=methods)
    assert sweep.main([str(config), "--output_path", str(output)]) == 1
    assert [r["status"] for r in read(output)] == ["failed", "out_of_memory", "done"]
    assert "100 tokens" in read(output)[0]["error"]
    said = capsys.readouterr().out
    assert "FAILED: full" in said and "OUT_OF_MEMORY: random" in said
    assert "Traceback" in (output / "points" / read(output)[1]["id"] / "log.txt").read_text()

    assert sweep.main([str(config), "--output_path", str(output)]) == 1  # told again, not run again
    assert "3 finished before" in capsys.readouterr().out
    monkeypatch.setattr(run_point, "_evaluate", original)
    assert sweep.main([str(config), "--output_path", str(output), "--retry-failed"]) == 1
    assert [r["status"] for r in read(output)] == ["failed", "done", "done"]


def test_one_sweep_at_a_time_in_a_folder(tmp_path: Path, capsys: Any) -> None:
    with sweep._alone_in(tmp_path):
        assert sweep.main([str(write(tmp_path)), "--output_path", str(tmp_path)]) == 2
    assert "another sweep is writing" in capsys.readouterr().err


def test_settings_can_be_replaced_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    config = write(tmp_path, vars={"c": [64]}, methods=[{"method": "random", "max_capacity_prompt": "${c}"}])
    arguments = ["--set", "c=[32, 64]", "--set", "limit=2", "--dry-run", "--output_path", str(tmp_path / "out")]
    assert sweep.main([str(config), *arguments]) == 0
    said = capsys.readouterr().out
    assert "2 points" in said and re.search(r"to do +2 ", said)
    assert sweep.main([str(config), "--set", "limit"]) == 2


def test_a_variable_that_the_sweep_does_not_have_is_one_line(tmp_path: Path, capsys: Any) -> None:
    """Not one for each of its points, with all settings of its method."""
    config = write(tmp_path, vars={"capacity": [32, 64]}, methods=[{"method": ["random", "snapkv"]}])
    assert sweep.main([str(config), "--set", "capasity=3", "--output_path", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--set capasity=...: " in line and "did you mean 'capacity'?" in line


@pytest.mark.slow
def test_ray_gives_the_same_table(undisturbed: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an optional extra")
    output = tmp_path / "out"
    arguments = ["--output_path", str(output), "--executor", "ray", "--num_workers", "2"]
    assert sweep.main([str(write(tmp_path)), *arguments]) == 0
    assert table(read(output)) == table(read(undisturbed / "out"))

"""lm-eval's own loggers, in a run of ours from its command line: metrics, pictures and files reach the tracker.

The libraries are stubs with the part of their API that lm-eval and we call; wandb itself, where it is installed, is run
offline.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kv_lm_eval import trackers

ROOT = Path(__file__).parents[2]
STUB = """
import json, os
__version__ = "0.31.0"
class _Said:
    def __init__(self, *path): self.path = path
    def __getattr__(self, name): return _Said(*self.path, name)
    def __call__(self, *args, **kwargs):
        with open(os.environ["SAID"], "a") as file:
            file.write(json.dumps([NAME, ".".join(self.path), repr(args), repr(kwargs)]) + "\\n")
        return self
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def write(self, text): pass
class Image:
    def __init__(self, path): self.path = path; open(path, "rb").read()
    def __repr__(self): return f"Image({os.path.basename(self.path)})"
class Artifact(Image):
    def __init__(self, name, type): self.files, self.name = [], name
    def add_file(self, path): self.files.append(os.path.basename(path))
    def new_file(self, *args, **kwargs): return _Said("file")
    def __repr__(self): return f"Artifact({self.name}: {self.files})"
class Table(_Said):
    def __init__(self, columns): super().__init__("table")
Trace = lambda **kwargs: "trace"
run, config = None, _Said("config")
def init(**kwargs): return _Said("run")
def active_run(): return None
def start_run(): return _Said("started")
log_params, log_metrics, log_artifact = _Said("log_params"), _Said("log_metrics"), _Said("log_artifact")
log, finish = _Said("run", "log"), _Said("run", "finish")
"""
ASKED = ["--model", "kvcompressed", "--tasks", "kv_needle_magic", "--model_args"]
METADATA = '{"lengths": [256], "depths": [0, 100], "samples_per_cell": 1}'


def evaluate(folder: Path, *more: str, stubs: bool = True) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "SAID": str(folder / "said"), "WANDB_MODE": "offline"}
    environment |= {
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "MLFLOW_EXPERIMENT_NAME": "needles",
    }
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if stubs:
        for name in ("wandb", "trackio", "mlflow"):
            (folder / "stubs" / name / "sdk" / "lib").mkdir(parents=True)
            for inner in ("", "sdk", "sdk/lib"):
                (folder / "stubs" / name / inner / "__init__.py").write_text("")
            (folder / "stubs" / name / "__init__.py").write_text(f"NAME = {name!r}\n{STUB}")
            (folder / "stubs" / name / "sdk" / "lib" / "printer.py").write_text("new_printer = object\n")
        places.insert(0, str(folder / "stubs"))
    run = subprocess.run(
        [sys.executable, "-m", "kv_lm_eval", "run", *ASKED, "pretrained=kv-tiny,method=snapkv,max_capacity_prompt=64",
         "--metadata", METADATA, "--output_path", str(folder / "out"), *more],
        env={**environment, "PYTHONPATH": os.pathsep.join(places)},
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "were not logged" not in run.stderr and "Logging to" not in run.stderr, run.stderr[-3000:]
    return (folder / "said").read_text() if stubs else run.stderr


@pytest.mark.slow
def test_metrics_and_pictures_reach_wandb_and_trackio_before_the_run_is_finished(tmp_path):
    said = evaluate(tmp_path, "--wandb_args", "project=a", "--trackio_args", "project=b", "--log_samples")
    for library in ("wandb", "trackio"):
        lines = [line for line in said.splitlines() if line.startswith(f'["{library}", "run')]
        (metrics,) = [line for line in lines if "kv/kept_fraction_mean" in line]
        assert "kv/by_task/kv_needle_magic/requests': 2.0" in metrics and "kv/efficiency/ttft_s/median" in metrics
        (images,) = [i for i, line in enumerate(lines) if "kv/pictures/" in line]
        assert "Image(kv_needle_magic_" in lines[images] and '"run.finish"' in lines[-1] and images < len(lines) - 1
    assert "Artifact(kv_pictures: ['kv_needle_magic_" in said
    assert "kv_needle_magic_eval_results" in said  # the table of samples, whose answers have no `floor`
    lines = [line for line in said.splitlines() if line.startswith('["mlflow", "log_')]
    assert "kv/kept_fraction_mean" in said and "kv_needle_magic/contains" in "".join(lines)
    assert "kv/max_capacity_prompt" in lines[0] and "log_params" in lines[0]
    assert [("results_" in line, ".png" in line) for line in lines[2:]] == [(True, False), (False, True)]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow")
def test_mlflow_itself_takes_them_into_a_folder(tmp_path):
    evaluate(tmp_path, stubs=False)
    (run,) = (tmp_path / "mlruns").glob("*/*/metrics")
    assert (run / "kv" / "kept_fraction_mean").is_file() and (run / "kv_needle_magic" / "contains").is_file()
    assert (run.parent / "params" / "kv" / "max_capacity_prompt").read_text() == "64"
    assert list(run.parent.glob("artifacts/results_*.json")) and list(run.parent.glob("artifacts/kv_pictures/*.png"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_wandb_itself_takes_them_offline(tmp_path):
    evaluate(tmp_path, "--wandb_args", "project=a", "--log_samples", stubs=False)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_pictures_go_beside_the_results_on_the_hub(tmp_path, monkeypatch):
    class Api:
        def __init__(self):
            self.said = []

        def upload_file(self, **words):
            self.said.append(words)

    class Tracker:
        api, push_results_to_hub, public_repo = Api(), True, False
        results_repo, results_repo_private = "me/results", "me/results-private"
        general_config_tracker = type("Config", (), {"model_name": "kv-tiny"})

    results, picture, old = tmp_path / "results_1.json", tmp_path / "grid.png", tmp_path / "old.png"
    for file in (old, results, picture):
        file.write_text("{}")
    os.utime(old, (1, 1))
    monkeypatch.setattr(trackers.reports, "write_all", lambda files: "")
    monkeypatch.setattr(trackers.saving, "written_last", lambda: [results])
    trackers._push_pictures(Tracker)
    (pushed,) = Tracker.api.said
    assert pushed["repo_id"] == "me/results-private" and pushed["path_in_repo"] == "kv-tiny/grid.png"
    Tracker.push_results_to_hub = False
    trackers._push_pictures(Tracker)
    assert len(Tracker.api.said) == 1


def test_other_models_have_no_metrics_of_ours():
    assert trackers.metrics_of({"config": {"model": "hf"}, "results": {}}) == {}
    stats = {"requests": 2, "by_task": {"a": {"peak_slots": 3, "name": "x", "ttft_s": {"median": None}}}}
    found = trackers.metrics_of({"config": {"kv_stats": stats}})
    assert found == {"kv/requests": 2.0, "kv/by_task/a/peak_slots": 3.0}


def test_samples_that_lack_a_score_have_none_in_the_table_of_samples():
    config = {"task": "a", "metric_list": [{"metric": m} for m in ("hit", "floor", "cells", "nats", "never")]}
    samples = [{"cells": {"x": 1}}, {"hit": 1.0, "cells": {}, "nats": (-3.0, 4)}, {"floor": 0.0, "cells": {}}]
    found, listed = trackers.with_every_score(samples, config)
    assert [m["metric"] for m in listed["metric_list"]] == ["hit", "floor", "nats"] and listed["task"] == "a"
    for sample, given in zip(found, samples, strict=True):
        for name in ("hit", "floor"):
            assert sample[name] == given[name] if name in given else math.isnan(sample[name])
        assert sample["nats"] == given["nats"] if "nats" in given else all(map(math.isnan, sample["nats"]))
    assert samples[0] == {"cells": {"x": 1}}

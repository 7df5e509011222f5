"""The verdicts of an evaluation that two processes share are those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kv_lm_eval import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = str(Path(tiny.__file__).parents[1] / "tasks" / "quickstart" / "texts")
TASKS = ("kv_quickstart_needle", "kv_quickstart_choice", "kv_fidelity_file")
METADATA = {"text_files": TEXTS, "max_eval_tokens": 200}
SETTINGS = {"method": "snapkv", "max_capacity_prompt": 64, "window_size": 16}


def alike(ours: object, wanted: object, where: str = "") -> None:
    """Equal to what another order of adding up leaves of float32."""
    if isinstance(wanted, dict):
        assert isinstance(ours, dict) and set(ours) == set(wanted), where
        for name, value in wanted.items():
            if name != "noise_floor":  # of each process's own prompts
                alike(ours[name], value, f"{where}.{name}")
    elif isinstance(wanted, list):
        assert isinstance(ours, list) and len(ours) == len(wanted), where
        for i, (one, other) in enumerate(zip(ours, wanted, strict=True)):
            alike(one, other, f"{where}[{i}]")
    else:
        assert ours == wanted or ours == pytest.approx(wanted, rel=1e-2, abs=1e-6), where


@pytest.mark.slow
def test_two_processes_say_what_one_says(run, tmp_path: Path) -> None:
    args = ",".join(f"{name}={value}" for name, value in SETTINGS.items())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "kv_lm_eval"]
    command += ["run", "--model", "kvcompressed", "--tasks", ",".join(TASKS), "--limit", "3", "--device", "cpu"]
    command += ["--model_args", f"pretrained=kv-tiny,dtype=float32,fidelity=True,{args}"]
    command += ["--metadata", json.dumps(METADATA), "--output_path", str(tmp_path), "--log_samples"]
    root = str(Path(tiny.__file__).parents[2])
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())["fidelity"]
    assert set(found) == set(TASKS)
    for task in TASKS:
        wanted = run(task, limit=3, metadata=METADATA, fidelity=True, **SETTINGS)["fidelity"][task]
        assert wanted["requests"] > 1 and found[task]["noise_floor"]
        alike(found[task], wanted, task)
    for task in TASKS:  # all samples have their numbers, whichever process ran them
        (samples,) = tmp_path.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        assert all("fidelity" in one or "kl" in one["doc"]["per_token"] for one in lines)

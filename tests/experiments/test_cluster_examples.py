"""The examples for clusters ask for the sweeps that they say, with commands of ours that are there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kv_lm_eval.experiments import sweep

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts" / "cluster").glob("*.sh"))


def started(script: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script with commands that print what they are asked."""
    for name in ("kv-lm-eval", "ray"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "cluster" / script), *arguments],
        env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_each_task_of_an_array_runs_its_value_in_its_folder(tmp_path):
    asked = [started("slurm_sweep.sh", tmp_path, "--dry-run", SLURM_ARRAY_TASK_ID=str(i)).stdout for i in range(3)]
    lines = [one.splitlines() for one in asked]
    assert [one[one.index("--set") + 1] for one in lines] == ["capacity=64", "capacity=128", "capacity=256"]
    assert len({one[one.index("--output_path") + 1] for one in lines}) == 3
    assert all(one[:2] == ["kv-lm-eval", "sweep"] and one[-1] == "--dry-run" for one in lines)
    assert (ROOT / lines[0][2]).is_file() and "capacity:" in (ROOT / lines[0][2]).read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_a_script_says_in_a_line_what_it_lacks(script, tmp_path):
    done = started(script.name, tmp_path, SLURM_ARRAY_TASK_ID="7")
    assert done.returncode and not done.stdout and len(done.stderr.strip().splitlines()) == 1


def test_the_ray_job_joins_the_cluster(tmp_path):
    done = started("ray_sweep.sh", tmp_path, "my.yaml", "--retry-failed", RAY_ADDRESS="http://h:8265", OUT="/shared/x")
    asked = done.stdout.splitlines()
    assert asked[:3] == ["ray", "job", "submit"] and asked[-1] == "--retry-failed"
    ours = asked[asked.index("--") + 1 :]
    assert ours[:3] == ["kv-lm-eval", "sweep", "my.yaml"] and ours[ours.index("--ray_address") + 1] == "auto"
    source = Path(sweep.__file__).read_text(encoding="utf-8")
    assert not [word for word in ours if word.startswith("--") and f'"{word}"' not in source]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_gets_what_the_build_reads():
    """A wheel is built from what .dockerignore lets through."""
    let = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert all((ROOT / name).exists() for name in let)
    source = (ROOT / "pyproject.toml").read_text(encoding="utf-8") + (ROOT / "hatch_build.py").read_text("utf-8")
    needed = {"kv_lm_eval", "longbench_tasks", "needle", "shim", "README.md", "LICENSE", "pyproject.toml"}
    assert all(name in source for name in needed - {"pyproject.toml"}) and needed | {"hatch_build.py"} <= let

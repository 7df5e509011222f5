"""Where a user works: files of our tasks' names, no git, and nothing on the screen that is no news."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kv_lm_eval import plugin, quiet

ROOT = Path(__file__).parents[2]
TASKS = "kv_needle_magic,kv_quickstart_ppl,kv_quickstart_choice"


def evaluate(command: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`kv-lm-eval run`, or `lm_eval run` plugged in, in a folder."""
    start = [sys.executable, "-m", "kv_lm_eval"]
    if command == "lm_eval":
        code = "import sys, kv_lm_eval.plugin as p; p.install(); from lm_eval.__main__ import cli_evaluate; "
        start = [sys.executable, "-c", code + "sys.argv[0] = 'lm_eval'; cli_evaluate()"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "GIT_CEILING_DIRECTORIES": str(folder)}
    method = "pretrained=kv-tiny,method=snapkv,max_capacity_prompt=128,window_size=16"
    return subprocess.run(
        [*start, "run", "--model", "kvcompressed", "--model_args", method, "--limit", "1", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["kv-lm-eval", pytest.param("lm_eval", marks=pytest.mark.slow)])
def test_a_users_own_files_are_neither_run_nor_in_the_way_and_nothing_is_said_that_is_no_news(command, tmp_path):
    for name in ("needle", "longbench_tasks", "functions", "docs", "scoring"):
        (tmp_path / f"{name}.py").write_text(f"print('the user\\'s {name} ran'); raise SystemExit(3)\n")
    metadata = '{"lengths": [256], "depths": [0], "samples_per_cell": 1}'
    run = evaluate(command, tmp_path, "--tasks", TASKS, "--metadata", metadata, "--output_path", "out")
    said = run.stdout + run.stderr
    assert run.returncode == 0 and "kv_needle_magic" in run.stdout, said
    assert "the user's" not in said
    assert len(list((tmp_path / "out").rglob("results_*.json"))) == 1
    for noise in ("not a git repository", "fatal:", "aggregation is not", "higher_is_better is not", "Custom kwargs"):
        assert noise not in said, noise
    warnings = [line for line in run.stderr.splitlines() if " WARNING " in line]
    assert [line for line in warnings if "--limit" not in line] == [], warnings


def test_task_modules_are_parts_of_our_package_and_of_no_other_name():
    code = """
import importlib, pkgutil, sys
import kv_lm_eval.tasks.needle.functions, kv_lm_eval.tasks.longbench_tasks as found
for module in pkgutil.walk_packages(found.__path__, found.__name__ + "."):
    importlib.import_module(module.name)
print([name for name in sys.modules if name.split(".")[0] in ("needle", "longbench_tasks")])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stderr


def test_a_wheel_has_no_package_but_ours_and_holds_the_task_folders(tmp_path):
    """Installed as `needle`, our files would meet those of the package of that name on PyPI."""
    pytest.importorskip("hatchling")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"kv_lm_eval", "_kv_lm_eval_shim.py", "kv_lm_eval.pth", "kv_lm_eval.start"}
    for folder in ("needle", "longbench_tasks"):
        here = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.yaml")}
        assert here and {f"kv_lm_eval/tasks/{name}" for name in here} <= set(names)


def test_the_build_hook_moves_the_folders_into_wheels_and_leaves_editable_installations_alone():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'packages = ["kv_lm_eval"]' in text
    pytest.importorskip("hatchling")
    sys.path.insert(0, str(ROOT))
    try:
        from hatch_build import TaskFolders
    finally:
        sys.path.remove(str(ROOT))
    for version, moved in (("standard", {"longbench_tasks", "needle"}), ("editable", set())):
        build_data: dict = {"force_include": {}}
        TaskFolders.initialize(None, version, build_data)
        assert set(build_data["force_include"]) == moved


def test_task_folders_are_found_where_they_are(tmp_path, monkeypatch):
    assert {folder.name for folder in plugin.task_folders()} == {"tasks", "longbench_tasks", "needle"}
    assert all(folder.is_dir() for folder in plugin.task_folders())
    for name in ("needle", "longbench_tasks"):  # as in a wheel
        (tmp_path / "kv_lm_eval" / "tasks" / name).mkdir(parents=True)
    monkeypatch.setattr(plugin, "__file__", str(tmp_path / "kv_lm_eval" / "plugin.py"))
    assert plugin.task_folders() == [tmp_path / "kv_lm_eval" / "tasks"]


def test_only_remarks_about_our_tasks_are_held_back(caplog):
    quiet.install()
    logger = logging.getLogger("lm_eval.api.task")
    with caplog.at_level(logging.WARNING):
        logger.warning("theirs: Custom kwargs can be passed to `--metadata`")
        logger.warning("kv_needle: Custom kwargs can be passed to `--metadata`")
        logger.warning("kv_needle: something new")
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["theirs", "kv_needle"]


def test_the_commit_is_still_told_in_a_repository(tmp_path, monkeypatch, capfd):
    from lm_eval.loggers import utils

    quiet.install()
    quiet.install()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert utils.get_git_commit_hash() is None and capfd.readouterr().err == ""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        if subprocess.run(["git", *arguments], capture_output=True).returncode:
            pytest.skip("git is not here")
    described = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True).stdout.strip()
    assert utils.get_git_commit_hash() == described != ""

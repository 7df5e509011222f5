"""The contracts of pyproject.toml hold, and each of them fails for an import that it forbids."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from kv_lm_eval.methods import base

ROOT = Path(__file__).parents[1]
TASKS = ("needle", "longbench_tasks")
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as a wheel has them, with the folders of tasks where they are imported from; no weights."""
    top = tmp_path_factory.mktemp("tree")
    sources = shutil.ignore_patterns("__pycache__", "model", "*.txt", "*.yaml")
    for folder in ("kv_lm_eval", *TASKS):
        shutil.copytree(ROOT / folder, top / folder, ignore=sources)
    for folder in TASKS:
        shutil.copytree(ROOT / folder, top / "kv_lm_eval" / "tasks" / folder, ignore=sources)
    shutil.copy(ROOT / "pyproject.toml", top)
    return top


def broken(tree: Path) -> tuple[set[str], str]:
    """Names of the contracts that a tree breaks, and what was printed."""
    done = subprocess.run(LINT, cwd=tree, capture_output=True, text=True, check=False)
    found = {line.removesuffix(" BROKEN") for line in done.stdout.splitlines() if line.endswith(" BROKEN")}
    assert done.returncode == bool(found), done.stdout + done.stderr
    return found, done.stdout


def test_the_order_holds_in_the_checkout_and_as_installed(tree: Path) -> None:
    for place in (ROOT, tree):
        found, printed = broken(place)
        assert not found, printed


DOWN = "Imports point down: commands, experiments, tasks, model, engine, methods, cache"
CIRCLES = "No circles between the files of a folder, nor between folders"
WRONG = {
    "cache knows a method, for the type checker": (
        "kv_lm_eval/cache/store.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kv_lm_eval.methods.base import Method",
        DOWN,
    ),
    "a method knows the engine, in a function": (
        "kv_lm_eval/methods/base.py",
        "def late():\n    from kv_lm_eval.engine import prefill",
        DOWN,
    ),
    "the engine knows the model": ("kv_lm_eval/engine/prefill.py", "import kv_lm_eval.model", DOWN),
    "errors know a command": ("kv_lm_eval/errors.py", "from kv_lm_eval import cli", DOWN),
    "two files of one folder": ("kv_lm_eval/cache/transfer.py", "from kv_lm_eval.cache.store import Kept", CIRCLES),
    "two folders": (
        "kv_lm_eval/tasks/needle/heatmap.py",
        "from kv_lm_eval.reporting.plots import drawing",
        CIRCLES,
    ),
    "the package knows a folder of tasks": (
        "kv_lm_eval/files.py",
        "import needle",
        "The package does not know the folders of tasks, nor these each other",
    ),
    "a treatment knows another": (
        "kv_lm_eval/methods/treatments/cam.py",
        "from kv_lm_eval.methods.treatments import d2o",
        "A treatment of the evicted is one file: it knows no other",
    ),
    "a form of storage knows another": (
        "kv_lm_eval/methods/storages/fp8.py",
        "from kv_lm_eval.methods.storages import kivi",
        "A form of storage is one file: it knows no other",
    ),
    "the cache knows lm-eval": (
        "kv_lm_eval/cache/rope.py",
        "def late():\n    import lm_eval.utils",
        "What compresses does not know lm-eval",
    ),
    "a method knows transformers": (
        "kv_lm_eval/methods/budget.py",
        "import transformers",
        "A method looks at tensors: it imports no model library",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_import_breaks_its_contract(wrong: str, tree: Path) -> None:
    file, text, contract = WRONG[wrong]
    right = (tree / file).read_text(encoding="utf-8")
    (tree / file).write_text(f"{right}\n{text}\n", encoding="utf-8")
    try:
        assert contract in broken(tree)[0]
    finally:
        (tree / file).write_text(right, encoding="utf-8")


def test_no_file_outside_methods_is_written_for_one_method() -> None:
    """A method is found by its name, so that another needs no import anywhere. The full cache is what the engine is
    checked with, and an analysis may be about one method."""
    graph = grimp.build_graph("kv_lm_eval", cache_dir=None)
    for name in set(base.available()) - {"full"}:
        module = base.load(name).__module__
        users = {m for m in graph.find_modules_that_directly_import(module) if m.split(".")[1] != "methods"}
        assert all(m.startswith("kv_lm_eval.analysis.") for m in users), f"{users} know {module}"

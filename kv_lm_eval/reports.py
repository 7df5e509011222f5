"""What is written beside lm-eval's results file after `kv-lm-eval run ... --output_path DIR`.

A task package that wants to say more than lm-eval's table has a module `report` with one function:

    write(results_file: Path) -> str     # writes its files beside it, returns what to print, "" if not concerned

The same function serves a script after a stock `lm_eval` run.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

PACKAGES = ("kv_lm_eval.tasks.longbench_tasks", "kv_lm_eval.tasks.needle")


def results_files(folder: Path) -> set[Path]:
    """lm-eval's results files below a folder."""
    return set(folder.rglob("results_*.json")) if folder.is_dir() else set()


def write_all(new_files: set[Path]) -> str:
    """Lets every task package report on every new results file; returns what they want to say."""
    said = []
    for package in PACKAGES:
        if importlib.util.find_spec(f"{package}.report") is not None:
            report = importlib.import_module(f"{package}.report")
            said += [report.write(file) for file in sorted(new_files)]
    return "\n".join(text for text in said if text)

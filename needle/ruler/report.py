"""RULER's numbers of an lm-eval run: each task by length, the mean of the 13, and kvpress's files for its leaderboard.

Printed by `kv-lm-eval run ... --output_path DIR`; where the run had protocol=kvpress and --log_samples, the files
(export.py) are written beside the results file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ConfigDict
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

from . import export
from .split import TASKS


class Results(TypedDict):
    """What is read of an lm-eval results file."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    results: NotRequired[dict[str, dict[str, Any]]]
    configs: NotRequired[dict[str, dict[str, Any]]]
    config: NotRequired[dict[str, Any]]


class Run(TypedDict):
    """A task's record of how it was run."""

    task: str
    protocol: str
    lengths: list[int]
    compress_questions: bool
    data: str


def write(results_file: Path) -> str:
    """Writes kvpress's files of a results file where it can; returns the page to print, "" without RULER."""
    results = files.read_json(results_file, Results)
    runs = read(results)
    if not runs:
        return ""
    said = page(results, runs)
    if any(run["protocol"] == "kvpress" for run in runs.values()) and export.samples_of(results_file):
        try:
            folders = export.write(results_file, results_file.with_name(f"kvpress_{export.date(results_file)}"))
        except UserError as error:
            return f"{said}\n  no files for kvpress's leaderboard: {error}"
        said += "\n  in kvpress's form: " + ", ".join(map(str, folders))
    return said


def read(results: Mapping[str, Any]) -> dict[str, Run]:
    """How each RULER task of a run was run, by lm-eval's name of it."""
    found = {}
    for task, config in results.get("configs", {}).items():
        run = config["metadata"].get("ruler") if isinstance(config.get("metadata"), dict) else None
        if isinstance(run, dict) and "string_match,none" in results.get("results", {}).get(task, {}):
            found[task] = files.check(run, Run, f"configs.{task}.metadata.ruler")
    return found


def scores(results: Mapping[str, Any], runs: Mapping[str, Run], length: int) -> dict[str, float]:
    """Each task's score at a length, in RULER's order, rounded as kvpress rounds it."""
    found = {}
    for task, run in runs.items():
        name = "string_match,none" if len(run["lengths"]) == 1 else f"string_match_{length},none"
        value = results["results"][task].get(name)
        if length in run["lengths"] and isinstance(value, (int, float)) and value == value:
            found[run["task"]] = round(float(value), 2)
    return {task: found[task] for task in TASKS if task in found}


def page(results: Mapping[str, Any], runs: Mapping[str, Run]) -> str:
    """What is printed."""
    protocols = sorted(
        {run["protocol"] + (", questions compressed" * run["compress_questions"]) for run in runs.values()}
    )
    data = sorted({run["data"] for run in runs.values()})
    lines = ["", f"RULER (protocol {'; '.join(protocols)}; data: {'; '.join(data)})"]
    lengths = sorted({length for run in runs.values() for length in run["lengths"]})
    by_length = {length: scores(results, runs, length) for length in lengths}
    lines.append(" " * 20 + "".join(f"{length:>10,}" for length in lengths))
    for task in TASKS:
        if any(task in of_length for of_length in by_length.values()):
            cells = (f"{by_length[n][task]:10.2f}" if task in by_length[n] else " " * 10 for n in lengths)
            lines.append(f"  {task:<18}" + "".join(cells).rstrip())
    means = {length: mean(of_length) for length, of_length in by_length.items()}
    if any(value is not None for value in means.values()):
        cells = (f"{value:10.2f}" if value is not None else f"{'':>10}" for value in means.values())
        lines.append(f"  {'mean of the 13':<18}" + "".join(cells).rstrip())
    if missing := [task for task in TASKS if any(task not in of_length for of_length in by_length.values())]:
        lines.append(f"  no mean of the 13: not run, {', '.join(missing)}")
    shares = {run["task"]: share for task, run in runs.items() if (share := _share(results, task)) is not None}
    if shares:
        least, most = min(shares, key=lambda t: shares[t]), max(shares, key=lambda t: shares[t])
        lines.append(
            f"  before the question, and compressed: {100 * shares[least]:.1f} % of a prompt ({least}) to "
            f"{100 * shares[most]:.1f} % ({most})"
        )
    if cut := sum(_cut(results, task) for task in runs):
        lines.append(f"  Not all samples were run ({cut} tasks): not to be compared with published numbers.")
    return "\n".join(lines)


def mean(of_length: Mapping[str, float]) -> float | None:
    """Mean of the 13 tasks; None where one is missing."""
    return round(fmean(of_length.values()), 2) if len(of_length) == len(TASKS) else None


def _share(results: Mapping[str, Any], task: str) -> float | None:
    """Median share of a prompt before its question."""
    stats = results.get("config", {}).get("kv_stats") or {}
    share = (stats.get("by_task") or {}).get(task, {}).get("context_share")
    return share["median"] if isinstance(share, dict) else None


def _cut(results: Mapping[str, Any], task: str) -> bool:
    counts = results.get("n-samples", {}).get(task, {})
    return bool(counts) and counts.get("effective") != counts.get("original")

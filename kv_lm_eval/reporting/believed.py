"""A file is believed if it is whole and agrees with itself, and left out if not; what was left out and why is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kv_lm_eval import files
from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import schemas
from kv_lm_eval.versions import RESULTS_FORMAT


@dataclass(frozen=True)
class Sweep:
    """How far a sweep is: the file of its plan, its name, and how many of its points are in which state."""

    plan: Path
    name: str
    states: Counter[str]

    @property
    def is_done(self) -> bool:
        """Whether every planned point has results."""
        return set(self.states) <= {"scored"}

    def __str__(self) -> str:
        words = {
            "scored": "done",
            "running": "running (or stopped on the way)",
            "failed": "failed",
            "OOM": "out of memory",
            "damaged": "with damaged files",
            "planned": "not started",
        }
        planned = self.states.total()
        counts = ", ".join(f"{n} {word}" for state, word in words.items() if (n := self.states[state]))
        return f"Sweep {self.name}: {planned} points planned: {counts}."


@dataclass
class Said:
    """What a reader must know: `damaged` names each file that was left out, with the reason."""

    notes: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)


def believed(file: Path, schema: Any, said: Said) -> dict[str, Any] | None:
    """The file as it stands if the schema holds, else None, and the reason is said."""
    try:
        found: dict[str, Any] = read_object(file, schema)
    except UserError as error:
        said.damaged.append(str(error))
        return None
    return found


def read_object(file: Path, schema: Any) -> Any:
    """A regular file's JSON, checked, nothing converted.

    Raises:
        UserError: names file and field.
    """
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise UserError(f"{file}: is no regular file")
    found = files.read_json(file)
    files.check(found, schema, str(file))
    return found


def results_of(file: Path, said: Said) -> dict[str, Any] | None:
    """A results file that agrees with itself, None (and said) otherwise."""
    if (results := believed(file, schemas.Results, said)) is None:
        return None
    if (written := results["config"].get("kv_format", 0)) > RESULTS_FORMAT:
        by = (results["config"].get("kv_versions") or {}).get("kv-lm-eval", "a later version")
        said.damaged.append(
            f"{file}: is of results format {written}, written by kv-lm-eval {by}; this one reads formats up to "
            f"{RESULTS_FORMAT}, so install the newer one"
        )
        return None
    wrong = next(_contradictions(results, file), None)
    if wrong:
        said.damaged.append(f"{file}: {wrong}")
        return None
    if lacking := [key for key in schemas.ALWAYS if key not in results]:
        said.notes.append(f"{file} has no {', '.join(lacking)} (another version of lm-eval?); read without.")
    stats = results["config"].get("kv_stats") or {}
    for what, numbers in (("the run", stats), *(stats.get("by_task") or {}).items()):
        if unknown := [name for name, value in numbers.items() if value is None]:
            said.notes.append(f"{file}: of {what} it is not known: {', '.join(sorted(unknown))}.")
    return results


def _contradictions(results: dict[str, Any], file: Path) -> Iterator[str]:
    """What a file written by lm-eval cannot hold, in words."""
    groups = {name for name, below in (results.get("group_subtasks") or {}).items() if below}
    tasks = {name for name in results["results"] if name not in groups}
    if not results["results"]:
        yield "results: holds no task"
    for key in ("n-samples", "n-shot", "versions", "higher_is_better"):
        if key in results and (other := tasks ^ (set(results[key]) - groups)):
            yield f"{key} and results name different tasks: {', '.join(sorted(other)[:3])}"
    for task, numbers in results["results"].items():
        yield from (f"results.{task}.{wrong}" for wrong in _wrong_scores(numbers, task in tasks))
    yield from _wrong_stats(results["config"], str(file))


def _wrong_scores(numbers: dict[str, Any], of_task: bool) -> Iterator[str]:
    for key, value in numbers.items():
        metric, comma, filter_ = key.partition(",")
        if not comma:
            continue
        if isinstance(value, bool) or (isinstance(value, str) and value != "N/A"):
            yield f"{key}: should be a number, got {value!r}"
        if metric.endswith("_stderr"):
            if not isinstance(value, (int, float, str)):
                yield f"{key}: should be a number or N/A"
        elif of_task and f"{metric}_stderr,{filter_}" not in numbers:
            yield f"{metric}_stderr,{filter_} is missing"
        if metric == "cells" and isinstance(value, list):
            yield from _wrong_cells(value, key)


def _wrong_cells(cells: list[Any], key: str) -> Iterator[str]:
    from kv_lm_eval.tasks.needle import heatmap

    try:
        heatmap.check_cells(cells, key)
    except UserError as error:
        yield str(error)


def _wrong_stats(config: dict[str, Any], place: str) -> Iterator[str]:
    """Our model writes its settings and its statistics, both or none."""
    ours = {"kv_compression", "kv_stats"} & set(config)
    if config["model"] == "kvcompressed" or ours:
        yield from (f"config.{key} is missing" for key in sorted({"kv_compression", "kv_stats"} - ours))
    stats = config.get("kv_stats")
    if stats is None:
        return
    empty = stats.get("requests") == 0 and "by_task" not in stats
    try:
        files.check(stats, schemas.NoStats if empty else schemas.RunStats, "config.kv_stats")
    except UserError as error:
        yield str(error)
        return
    by_task = stats.get("by_task") or {}
    if sum(of_task["requests"] for of_task in by_task.values()) < stats["requests"]:
        yield f"config.kv_stats: {stats['requests']} requests, fewer in by_task"
    if "efficiency" not in stats and any("efficiency" in of_task for of_task in by_task.values()):
        yield "config.kv_stats.efficiency is missing"

"""Reads lm-eval's results files and the points of a sweep, whatever folders they lie in.

A file is believed if it is whole, and left out if not: what was left out and why is part of what is returned. Answers
are read when they are asked for (answers.py).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from kv_lm_eval import files
from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import schemas

UNCOMPRESSED = ("full", "hf", "no_cache")
STATES = {"done": "scored", "failed": "failed", "out_of_memory": "OOM", "running": "running"}


@dataclass(frozen=True)
class Run:
    """One results file of lm-eval, or one point of a sweep that has none.

    state is "scored"; "failed", "OOM", "running" (or stopped on the way) or "planned" for points without results;
    "damaged" for those whose results cannot be believed.
    """

    results: dict[str, Any]
    results_file: Path | None = None
    point: dict[str, Any] = field(default_factory=dict)
    state: str = "scored"
    covers: tuple[str, ...] = ()  # the tasks of the groups that a point without results asks for

    @property
    def config(self) -> dict[str, Any]:
        """lm-eval's `config`."""
        return self.results.get("config") or {}

    @cached_property
    def model_args(self) -> dict[str, Any]:
        """--model_args as a mapping."""
        given = self.config.get("model_args") or self.point.get("model_args") or {}
        return parse_pairs(given) if isinstance(given, str) else dict(given)

    @property
    def model(self) -> str:
        """The model's name, without its folder."""
        name = (
            self.results.get("model_name") or self.model_args.get("pretrained") or self.config.get("model") or "model"
        )
        return Path(str(name)).name or str(name)

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings: all of them for a finished run, those configured for another."""
        found = self.config.get("kv_compression") or self.point.get("settings") or {}
        return {k: v for k, v in found.items() if k != "method"}

    @property
    def method(self) -> str:
        """The method's name; "hf" and the like for a model of lm-eval's own."""
        found = (self.config.get("kv_compression") or {}).get("method") or self.point.get("method")
        return str(found or self.config.get("model") or self.point.get("model") or "model")

    @property
    def is_full_cache(self) -> bool:
        """Whether nothing is compressed by construction: method=full, or no method of ours at all."""
        return self.method in UNCOMPRESSED or not (self.config.get("kv_compression") or self.point.get("method"))

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """The numbers of each task and group, by name; empty mappings for a run without results."""
        if self.state == "scored":
            return self.results.get("results") or {}
        return {task: {} for task in (*(self.point.get("tasks") or []), *self.covers)}

    @property
    def date(self) -> float:
        """Seconds since 1970."""
        return float(self.results.get("date") or 0)

    @property
    def stats(self) -> dict[str, Any]:
        """What compression did (kv_lm_eval.metrics), {} for a stock model."""
        return self.config.get("kv_stats") or {}

    def task_stats(self, task: str) -> dict[str, Any]:
        """The same for one task; {} where it is not known."""
        return (self.stats.get("by_task") or {}).get(task) or {}

    def documents(self, task: str) -> int | None:
        """How many documents a task was asked, None where that is not recorded."""
        found = (self.results.get("n-samples") or {}).get(task) or {}
        return found.get("effective")

    def samples_file(self, task: str) -> Path | None:
        """Where --log_samples wrote a task's answers, None if it did not."""
        if self.results_file is None:
            return None
        date = self.results_file.stem.removeprefix("results_")
        file = self.results_file.with_name(f"samples_{task}_{date}.jsonl")
        logged = task in (self.results.get("task_hashes") or {})
        return file if logged or file.exists() else None

    def subtasks(self, group: str) -> list[str]:
        """The leaf tasks of a group, those of its subgroups included; [] for a task."""
        return _leaves(self.results.get("group_subtasks") or {}, group, ())


def _leaves(below: dict[str, list[str]], group: str, above: tuple[str, ...]) -> list[str]:
    leaves: list[str] = []
    for name in below.get(group) or []:
        if name not in above:  # a damaged file may hold a circle
            leaves += _leaves(below, name, (*above, group)) or [name]
    return list(dict.fromkeys(leaves))


def parse_pairs(text: str) -> dict[str, Any]:
    """`key=value,key=value`, values typed as lm-eval types them."""
    return {k: _typed(v.strip()) for k, equals, v in (p.partition("=") for p in text.split(",")) if equals}


def _typed(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def is_number(value: Any) -> TypeGuard[float]:
    """A real number: no bool, no NaN, no "N/A"."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------------------------------------- folders


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


class Found(NamedTuple):
    """Every run, those of sweeps in the order of their plans, then by date, and what there is to say about them."""

    runs: list[Run]
    said: Said


def read(folder: Path) -> Found:
    """Every run below a folder.

    Raises:
        UserError: there is no such folder, or nothing in it that can be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Give the --output_path of your lm_eval runs, or of a sweep.")
    said = Said()
    runs, in_points = _points(folder, said)
    runs += _loose(sorted(set(folder.rglob("results_*.json")) - in_points), said)
    if not runs:
        damaged = "".join(f"\nLeft out: {text}" for text in said.damaged)
        raise UserError(
            f"No results below {folder}. lm-eval writes results_*.json there when it is run with "
            f"`--output_path FOLDER`; add `--log_samples` for differences with intervals and for the answers.{damaged}"
        )
    return Found(runs, said)


def _loose(found: list[Path], said: Said) -> list[Run]:
    runs = []
    for file in found:
        if (results := _results(file, said)) is not None:
            runs.append(Run(results, file))
    return sorted(runs, key=lambda run: run.date)


def _points(folder: Path, said: Said) -> tuple[list[Run], set[Path]]:
    """The runs of all sweeps below a folder, and the results files that belong to points, believed or not."""
    plans = {file: plan for file in sorted(folder.rglob("plan.json")) if (plan := _believed(file, schemas.Plan, said))}
    records, runs, in_points = {}, [], set()
    for file in sorted(folder.rglob("point.json")):
        in_points |= set(file.parent.rglob("results_*.json"))
        records[file.parent] = _believed(file, schemas.Record, said)
    taken = set()
    for plan_file, plan in plans.items():
        states: Counter[str] = Counter()
        for point in plan["points"]:
            place = plan_file.parent / "points" / point["id"]
            run = _run_of(place, records[place], point, said) if place in records else Run({}, None, point, "planned")
            taken.add(place)
            states[run.state] += 1
            runs.append(run)
        said.sweeps.append(Sweep(plan_file, plan["name"] or plan_file.parent.name, states))
    for place, record in records.items():
        if place not in taken and record is not None:
            runs.append(_run_of(place, record, record, said))
            if plans:
                said.notes.append(f"{place / 'point.json'}: {record['name']} is in no plan (any more).")
    return runs, in_points


def _run_of(place: Path, record: dict[str, Any] | None, point: dict[str, Any], said: Said) -> Run:
    """A point that was started; what the plan says of it stands in for a record that cannot be believed."""
    if record is None:
        return Run({}, None, point, "damaged")
    state = STATES[record["status"]]
    if state != "scored":
        return Run({}, None, record, state)
    if not record["results_file"]:
        said.damaged.append(f"{place / 'point.json'}: says that it is done and names no results_file")
        return Run({}, None, record, "damaged")
    file = place / record["results_file"]
    if not file.resolve().is_relative_to(place.resolve()):
        said.damaged.append(f"{place / 'point.json'}: results_file leads out of the point's folder")
        return Run({}, None, record, "damaged")
    if not file.exists():
        said.damaged.append(f"{place / 'point.json'}: says that it is done, and {file} is not there")
        return Run({}, None, record, "damaged")
    results = _results(file, said)
    if results is None:
        return Run({}, None, record, "damaged")
    given = results["config"]["model_args"]
    if isinstance(given, dict) and (other := [k for k, v in record["model_args"].items() if given.get(k) != v]):
        said.damaged.append(
            f"{file}: is of another configuration than {place / 'point.json'} (model_args: {', '.join(other)})"
        )
        return Run({}, None, record, "damaged")
    return Run(results, file, record)


# ---------------------------------------------------------------------------------------------- what is believed


def _believed(file: Path, schema: Any, said: Said) -> dict[str, Any] | None:
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


def _results(file: Path, said: Said) -> dict[str, Any] | None:
    """A results file that agrees with itself, None (and said) otherwise."""
    if (results := _believed(file, schemas.Results, said)) is None:
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


def name_of(folder: Path, said: Said) -> str:
    """The sweep's name where the folder is one, else the folder's."""
    mine = [sweep.name for sweep in said.sweeps if sweep.plan.parent == folder]
    return mine[0] if mine else folder.resolve().name


def digest(value: Any) -> str:
    """JSON that is the same for the same value."""
    return json.dumps(value, sort_keys=True, default=str)

"""Finds lm-eval's results files and the points of a sweep, whatever folders they lie in.

Answers are read when they are asked for (answers.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import schemas
from kv_lm_eval.reporting.believed import Said, Sweep, believed, results_of
from kv_lm_eval.reporting.run import Run

STATES = {"done": "scored", "failed": "failed", "out_of_memory": "OOM", "running": "running"}


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
            f"No results below {folder}. lm-eval writes results_*.json there when it is run with --output_path FOLDER; "
            f"add --log_samples for differences with intervals and for the answers.{damaged}"
        )
    return Found(runs, said)


def _loose(found: list[Path], said: Said) -> list[Run]:
    runs = []
    for file in found:
        if (results := results_of(file, said)) is not None:
            runs.append(Run(results, file))
    return sorted(runs, key=lambda run: run.date)


def _points(folder: Path, said: Said) -> tuple[list[Run], set[Path]]:
    """The runs of all sweeps below a folder, and the results files that belong to points, believed or not."""
    plans = {file: plan for file in sorted(folder.rglob("plan.json")) if (plan := believed(file, schemas.Plan, said))}
    records, runs, in_points = {}, [], set()
    for file in sorted(folder.rglob("point.json")):
        in_points |= set(file.parent.rglob("results_*.json"))
        records[file.parent] = believed(file, schemas.Record, said)
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
    results = results_of(file, said)
    if results is None:
        return Run({}, None, record, "damaged")
    given = results["config"]["model_args"]
    if isinstance(given, dict) and (other := [k for k, v in record["model_args"].items() if given.get(k) != v]):
        said.damaged.append(
            f"{file}: is of another configuration than {place / 'point.json'} (model_args: {', '.join(other)})"
        )
        return Run({}, None, record, "damaged")
    return Run(results, file, record)


def name_of(folder: Path, said: Said) -> str:
    """The sweep's name where the folder is one, else the folder's."""
    mine = [sweep.name for sweep in said.sweeps if sweep.plan.parent == folder]
    return mine[0] if mine else folder.resolve().name

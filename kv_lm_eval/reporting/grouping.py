"""Which runs share a row, and what a row is called: its method, and what it differs in from the method's other rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from kv_lm_eval.reporting import configuration
from kv_lm_eval.reporting.cells import Row, some
from kv_lm_eval.reporting.configuration import BUDGETS
from kv_lm_eval.reporting.run import Run, digest, is_number


def group(runs: Sequence[Run], notes: list[str]) -> list[Row]:
    """A row a method, its settings, and the conditions in which some task was run in two ways."""
    contested = configuration.contested(runs)
    groups: dict[str, list[Row]] = {}
    for run in runs:
        conditions = configuration.of_run(run)
        shared = {name: conditions.get(name) for name in sorted(contested)}
        settings = run.point["settings"] if run.point else run.settings  # of a point, known before it is run
        identity = digest([run.model, run.method, settings, run.point.get("name"), shared])
        alike = groups.setdefault(identity, [])
        home = next((row for row in alike if not _conflict(row, run)), None)
        if home is None:
            home = Row([], variant={k: v for k, v in shared.items() if v is not None})
            alike.append(home)
        home.runs.append(run)
    rows = [row for alike in groups.values() for row in alike]
    _name_templates(rows)
    for row in rows:
        twice = [
            t for t in dict.fromkeys(t for r in row.runs for t in r.tasks) if sum(t in r.tasks for r in row.runs) > 1
        ]
        if twice:
            files = ", ".join(str(r.results_file or r.point.get("id")) for r in row.runs if twice[0] in r.tasks)
            notes.append(
                f"{row.first.method}: {some(twice)} run more than once with the same settings; the latest one is "
                f"shown ({files})."
            )
    methods = list(dict.fromkeys(row.first.method for row in rows))
    return sorted(
        rows, key=lambda row: (not row.first.is_full_cache, methods.index(row.first.method), _budget(row.first))
    )


def _name_templates(rows: Sequence[Row]) -> None:
    """A chat template is a program: a label has "yes", and a few letters of its hash where there are several."""
    texts = {digest(row.variant["chat_template"]) for row in rows if "chat_template" in row.variant}
    for row in rows:
        if (template := row.variant.get("chat_template")) is not None:
            row.variant["chat_template"] = "yes" if len(texts) == 1 else f"yes~{configuration.letters(template)}"


def _budget(run: Run) -> float:
    """For the order of a method's rows; a sweep keeps its own order."""
    found = [run.settings[name] for name in BUDGETS if is_number(run.settings.get(name))]
    return 0.0 if run.point or not found else float(found[0])


def _conflict(row: Row, run: Run) -> bool:
    """Whether a run asked one of the row's tasks for other documents, or in other conditions of the task's own."""
    return any(
        not (run.state == other.state == "scored")
        or run.settings != other.settings
        or configuration.of_task(run, task) != configuration.of_task(other, task)
        or configuration.documents(run, task) != configuration.documents(other, task)
        for other in row.runs
        for task in run.tasks
        if task in other.tasks
    )


def label(rows: list[Row]) -> list[Row]:
    """Method and what differs between its rows; a sweep's own name, and what differs between rows of one name."""
    several_models = len({row.first.model for row in rows}) > 1
    for row in rows:
        twins = [other for other in rows if _kin(other) == _kin(row)]
        own, differing = _own_and_differing(row, twins)
        if not row.first.is_full_cache and not set(differing) & set(BUDGETS):
            differing = [name for name in BUDGETS if row.first.settings.get(name) is not None][:1] + differing
        method = "full (hf)" if row.first.method == "hf" else row.first.method
        parts = [method, *_parts(own, differing)]
        if name := row.first.point.get("name"):
            own, differing = _own_and_differing(row, [t for t in twins if t.first.point.get("name") == name])
            parts = [name, *_parts(own, differing)]
        label = re.sub(r"=[^\s=]*/", "=", " ".join(parts))  # a file without its folder
        row.label = f"{row.first.model}: {label}" if several_models else label
    _tell_apart(rows)
    return rows


def _kin(row: Row) -> tuple[str, str]:
    return row.first.model, row.first.method


def _own_and_differing(row: Row, twins: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    """What is recorded of a row, and the names of it in which it and its twins differ."""
    of_tasks = [_of_tasks(twin) for twin in twins]
    names = {name for tasks in of_tasks for of_task in tasks.values() for name in of_task}
    tasks = list(dict.fromkeys(task for tasks in of_tasks for task in tasks))

    def ways(name: str, task: str) -> set[str]:
        return {digest(tasks[task].get(name)) for tasks in of_tasks if task in tasks}

    contested = [name for name in sorted(names) if any(len(ways(name, task)) > 1 for task in tasks)]
    recorded = []
    for twin in (*twins, row):
        mine = {n: _one({t: v.get(n) for t, v in _of_tasks(twin).items() if len(ways(n, t)) > 1}) for n in contested}
        recorded.append({**twin.first.settings, **{k: None for t in twins for k in t.variant}, **twin.variant, **mine})
    return recorded[-1], configuration.differing(recorded)


def _of_tasks(row: Row) -> dict[str, dict[str, Any]]:
    return {t: configuration.of_task(run, t) for run in row.runs if run.state == "scored" for t in run.tasks}


def _one(by_task: dict[str, Any]) -> Any:
    """The value of all tasks, where it is one."""
    values = {digest(v): v for v in by_task.values()}
    return next(iter(values.values()), None) if len(values) < 2 else by_task


def _parts(own: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{name}={configuration.shown(own[name])}" for name in names if own.get(name) is not None]


def _tell_apart(rows: Sequence[Row]) -> None:
    """Rows that still have one label get the first recorded things that differ; a number where nothing does."""
    for label in [label for label, n in Counter(row.label for row in rows).items() if n > 1]:
        same = [row for row in rows if row.label == label]
        whole = [{**configuration.rest(row.first), **row.first.settings, **row.variant} for row in same]
        for name in configuration.differing(whole):
            if len({row.label for row in same}) == len(same):
                break
            for row, own in zip(same, whole, strict=True):
                row.label += "".join(f" {part}" for part in _parts(own, [name]))
        for i, row in enumerate(same, 1):
            row.label += f" #{i}" if sum(other.label == row.label for other in rows) > 1 else ""

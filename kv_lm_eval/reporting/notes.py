"""What there is to say of a report's numbers: what a reader would otherwise take for a result."""

from __future__ import annotations

from collections.abc import Iterator

from kv_lm_eval.reporting import configuration
from kv_lm_eval.reporting.cells import Column, Report, Row, differences, every_score, some
from kv_lm_eval.reporting.run import Run, digest


def add(out: Report) -> None:
    """Adds the notes to the report's own."""
    _warn_of_sweeps(out)
    _warn_of_missing_scores(out)
    for row in out.rows:
        for run in row.runs:
            if run.state in ("failed", "OOM"):
                error = str(run.point.get("error") or "no reason recorded").strip().splitlines()[-1]
                out.notes.append(f"{row.label}: {run.state}. {error[:300]}")
        if alike := _not_alike(out, row):
            out.notes.append(f"{row.label}: not run as the full cache that it is compared with: {alike}.")
        untouched = [c.task for c, cell in row.cells.items() if cell.untouched]
        if untouched:
            out.notes.append(
                f"{row.label} compressed no request of {some(untouched)}: its score is the full cache's. Longer "
                "prompts or a smaller budget are needed to say anything about the method."
            )
        for column, cell in row.cells.items():
            if cell.unscored and column.metric != "floor":
                out.notes.append(
                    f"{row.label}, {column.task}: {cell.unscored} documents have no {column.metric} "
                    f"({row.answers_of(column.task)})."
                )
            if (c := cell.comparison) is None:
                continue
            if c.left_out:
                out.notes.append(
                    f"{row.label}, {column.task}: asked other documents or prompts than the full cache; compared on "
                    f"the {c.documents} {c.unit} they have in common ({c.left_out} documents left out). "
                    "The scores themselves are not comparable."
                )
            if c.verdict == "too few documents" and c.clusters < c.documents:
                out.notes.append(
                    f"{row.label}, {column.task}: its {c.documents} {c.unit} are about {c.clusters} texts only, too "
                    "few to tell a difference from noise."
                )
            if (sides := _tokens_of_one(out, row, column)) is not None:
                out.notes.append(f"{row.label}, {column.task}: tokens are recorded in only one of {sides}.")
            if c.reason:
                lacks = "no interval" if c.difference is not None else "no difference"
                out.notes.append(f"{row.label}, {column.task}: {lacks}, {c.reason}.")
    out.said.notes += _seeds(out)
    for model in out.models:
        if not any(row.first.is_full_cache and row.first.model == model for row in out.rows):
            out.notes.append(f"{model}: no run with the full cache (method=full), so there is nothing to compare with.")
    for task in dict.fromkeys(column.task for column in out.columns):
        versions = {
            str((r.results.get("versions") or {}).get(task))
            for row in out.rows
            if (r := row.run_of(task)) and r.results
        }
        if len(versions) > 1:
            out.notes.append(f"{task} was run in several versions of the task: {', '.join(sorted(versions))}.")
        prompts = _changed_prompts(out, task)
        if prompts:
            out.notes.append(
                f"{task}: {prompts} documents were asked with other prompts than under the full cache, "
                "which are not compared."
            )


def _tokens_of_one(out: Report, row: Row, column: Column) -> str | None:
    """Two files of answers, where one records the tokens by which long texts are compared and the other does not."""
    base = out.base_of(row, column)
    if base is None or column.leaves:
        return None
    sides = [side.samples(column.task, column.filter).values() for side in (row, base)]
    if not all(sides) or len({any(sample.blocks for sample in side) for side in sides}) == 1:
        return None
    return f"{row.answers_of(column.task)} and {base.answers_of(column.task)}"


def _warn_of_sweeps(out: Report) -> None:
    unfinished = [str(sweep) for sweep in out.said.sweeps if not sweep.is_done]
    out.said.notes[:0] = [f"{text} These tables are not complete." for text in unfinished]


def _warn_of_missing_scores(out: Report) -> None:
    """A score that other runs of the task have: a file that lost it would look like one that never had it."""
    runs = [run for row in out.rows for run in row.runs if run.state == "scored"]
    first: dict[str, dict[Column, tuple[Column, Run]]] = {}
    for run in runs:
        for task in run.tasks:
            for column in every_score(run, task):
                first.setdefault(task, {}).setdefault(column, (column, run))
    for run in runs:
        for task in first:
            if task not in run.tasks and not run.subtasks(task):
                continue
            mine = every_score(run, task)
            if lacking := [column.metric for column in first[task] if column not in mine]:
                out.notes.append(f"{run.results_file}: {task} has no {', '.join(lacking)}, which other runs have.")
            out.said.notes += (text for column in mine for text in _disagreement(run, column, *first[task][column]))


def _disagreement(run: Run, column: Column, first: Column, other: Run) -> Iterator[str]:
    """Where a run says other things of a score than the first run that has it."""
    files = f"{run.results_file} and {other.results_file}, {column.task}"
    if first.higher_is_better != column.higher_is_better:
        yield f"{files}: they do not agree on whether more or less {column.metric} is better."
    if set(first.leaves) != set(column.leaves):
        yield f"{files}: they do not hold the same tasks."
    directions = (run.results.get("higher_is_better") or {}).get(column.task) or {}
    if run is other and column.metric not in directions:
        yield f"{run.results_file}: {column.task} does not say whether more or less {column.metric} is better."


def _not_alike(out: Report, row: Row) -> str:
    """What else differs from the full cache, with both values, and the first task of which it is so."""
    for column, cell in row.cells.items():
        base = out.base_of(row, column) if cell.comparison else None
        if base is None or (names := [n for n in differences(row, base, column.task) if n != "limit"]) == []:
            continue
        ours, theirs = row.run_of(column.task), base.run_of(column.task)
        assert ours is not None and theirs is not None
        told = []
        for name in names:
            values = [
                {**run.settings, **configuration.of_run(run), **configuration.of_task(run, column.task)}.get(name)
                for run in (ours, theirs)
            ]
            mine, base_value = ("none" if value is None else configuration.shown(value) for value in values)
            told.append(f"{name}={mine} against {base_value}")
        return f"{', '.join(told)} ({column.task})"
    return ""


def _seeds(out: Report) -> list[str]:
    """What a method that draws at random owes to its draw: the spread over its seeds, or that there was one alone."""
    groups: dict[str, list[Row]] = {}
    for row in out.rows:
        settings = row.first.settings
        if "seed" in settings and settings.get("strategy", "random") == "random":
            rest = {k: v for k, v in settings.items() if k != "seed"}
            identity = [row.first.model, row.first.method, rest, row.variant]
            groups.setdefault(digest(identity), []).append(row)
    notes = []
    for rows in groups.values():
        if len({repr(row.first.settings["seed"]) for row in rows}) == 1:
            notes.append(
                f"{rows[0].label} draws at random and was run with one seed: another seed, another score, so that its "
                "place among the others is the draw's too. Run several seeds."
            )
            continue
        for column in out.columns:
            found = [c.value for row in rows if (c := row.cells[column]).state == "scored" and c.value is not None]
            if len(found) > 1:
                mean = sum(found) / len(found)
                notes.append(
                    f"{rows[0].first.method}, {column.task}: {len(found)} seeds from {min(found):.4g} to "
                    f"{max(found):.4g}, mean {mean:.4g} ({', '.join(row.label for row in rows)})."
                )
    return notes


def _changed_prompts(out: Report, task: str) -> int:
    changed = set()
    for column in (c for c in out.columns if c.task == task and not c.leaves):
        for row in out.rows:
            base = out.base_of(row, column)
            if base is None or base is row:
                continue
            theirs = base.samples(task, column.filter)
            for key, sample in row.samples(task, column.filter).items():
                if key in theirs and theirs[key].prompt_hash != sample.prompt_hash:
                    changed.add(key)
    return len(changed)

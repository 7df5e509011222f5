"""A report's numbers: which score stands where, each compared with the full cache's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import compare, families, grouping, notes
from kv_lm_eval.reporting.answers import Sample, SampleKey
from kv_lm_eval.reporting.believed import Said
from kv_lm_eval.reporting.cells import Cell, Column, Report, Row, every_score
from kv_lm_eval.reporting.run import Run, is_number
from kv_lm_eval.stats import clusters, paired

# A task's main score, where it has several: the first of these, else the first it lists.
MAIN = ("score", "kl_mean", "token_perplexity", "perplexity", "bits_per_byte")


def report(runs: Sequence[Run], said: Said | None = None, metrics: Sequence[str] = ()) -> Report:
    """Rows, columns, cells and comparisons.

    Args:
        runs: as load.read gives them.
        said: what the reader should know already; more is added to it.
        metrics: scores to show, where a task has them, in place of its main one.
    """
    said = said or Said()
    below = {name: leaves for run in runs for name in run.tasks if (leaves := run.subtasks(name))}
    runs = [run if run.state == "scored" else _covering(run, below) for run in runs]
    rows = grouping.label(grouping.group(runs, said.notes))
    out = Report(rows, _columns(rows, metrics, below), said)
    if unknown := set(metrics) - {column.metric for column in out.columns}:
        known = sorted(
            {c.metric for row in rows for run in row.runs for task in run.tasks for c in every_score(run, task)}
        )
        raise UserError(f"no task here has a score named {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    for row in rows:
        row.cells = {column: cell(row, column) for column in out.columns}
    _compare_all(out)
    said.damaged += dict.fromkeys(text for row in rows for text in row.unread.values())
    notes.add(out)
    return out


def _covering(run: Run, below: dict[str, list[str]]) -> Run:
    return replace(run, covers=tuple(dict.fromkeys(leaf for task in run.tasks for leaf in below.get(task, ()))))


# ---------------------------------------------------------------------------------------------- columns and cells


def _columns(rows: Sequence[Row], metrics: Sequence[str], below: dict[str, list[str]]) -> list[Column]:
    found: dict[str, list[Column]] = {}
    for row in rows:
        for run in row.runs:
            for task, numbers in run.tasks.items():
                if task not in found and (shown := chosen(run, task, numbers, metrics)):
                    found[task] = shown
    tasks = [c for columns in found.values() for c in columns if not c.leaves]
    groups = [c for columns in found.values() for c in columns if c.leaves]
    ahead = {t: None for row in rows for run in row.runs if run.state != "scored" for t in run.tasks if t not in below}
    unknown = [Column(task, "no score yet", "", None) for task in ahead if task not in found]
    return families.in_order(tasks + unknown + groups)


def chosen(run: Run, task: str, numbers: dict[str, Any], metrics: Sequence[str]) -> list[Column]:
    """A task's main score, or those asked for that it has."""
    known = every_score(run, task)
    if asked := [column for column in known if column.metric in metrics]:
        return asked
    cells = next((v for k, v in numbers.items() if k.startswith("cells,") and v), None)
    for name in ([cells[0]["primary"]] if cells else []) + list(MAIN):
        if preferred := [column for column in known if column.metric == name]:
            return preferred[:1]
    return known[:1]


def cell(row: Row, column: Column) -> Cell:
    """A row's score, with what its files say of it."""
    run = row.run_of(column.task)
    if run is None:
        return Cell()
    if run.state != "scored":
        return Cell(state=run.state)
    numbers = run.tasks[column.task]
    value, stderr = numbers.get(column.key), numbers.get(f"{column.metric}_stderr,{column.filter}")
    if not is_number(value):
        return Cell()
    leaves = column.leaves or (column.task,)
    counts = [(run.results.get("n-samples") or {}).get(leaf, {}).get("effective") for leaf in leaves]
    known = [n for n in counts if is_number(n)]
    compressed = [run.task_stats(leaf).get("compressed_share") for leaf in leaves]
    found = {} if column.leaves else row.samples(column.task, column.filter)
    clustered = _standard_error(found, column.metric, float(value))
    return Cell(
        state="scored",
        value=float(value),
        stderr=clustered if clustered is not None else float(stderr) if is_number(stderr) else None,
        documents=int(sum(known)) if known else None,
        untouched=not run.is_full_cache and bool(compressed) and all(share == 0 for share in compressed),
        unscored=sum(column.metric not in sample.metrics for sample in found.values()),
    )


def _standard_error(found: dict[SampleKey, Sample], metric: str, value: float) -> float | None:
    """Where documents share a text, of which lm-eval's own error knows nothing; None where they do not."""
    having = [s for s in found.values() if metric in s.metrics]
    (of_document,) = clusters.label([[s.texts for s in having]])
    if not having or len(set(of_document.tolist())) == len(having):
        return None
    values = [s.metrics[metric] for s in having]
    aggregation = paired.aggregation_of([(values, value)])
    table = aggregation.table(values) if aggregation else None
    return None if aggregation is None or table is None else paired.standard_error(table, aggregation, of_document)


def _compare_all(out: Report) -> None:
    for column in out.columns:
        for row in out.rows:
            found = row.cells[column]
            if found.state != "scored":
                continue
            base = out.base_of(row, column)
            if base is row:
                found.is_base = True
            elif base is not None:
                found.comparison = compare.rows(row, base, column)

"""Scores and measures divided by the full cache's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kv_lm_eval.reporting import tables
from kv_lm_eval.reporting.cells import Column, Report
from kv_lm_eval.reporting.plots import drawing


@dataclass(frozen=True)
class Relative:
    """One measure of all rows, relative to the full cache: 1 is the same."""

    name: str
    ratios: dict[str, float]  # by label
    higher_is_better: bool


def relatives(report: Report) -> list[Relative]:
    """Scores and measures divided by the full cache's; what has none is left out."""
    out = []
    for column in drawing.shown_tasks(report):
        ratios = {}
        for row in report.rows:
            base = report.base_of(row, column)
            mine = row.cells[column].value
            theirs = base.cells[column].value if base else None
            if mine is not None and theirs:
                ratios[row.label] = mine / theirs
        out.append(
            Relative(f"{column.task}\n{column.metric} {column.arrow}", ratios, column.higher_is_better is not False)
        )
    for measure in tables.MEASURES:
        if measure.title in ("KV at the end", "KV allocated", "overhead"):
            continue
        ratios = measured_ratios(report, measure.names)
        out.append(
            Relative(f"{measure.title} {'↑' if measure.higher_is_better else '↓'}", ratios, measure.higher_is_better)
        )
    return [r for r in out if len(r.ratios) > 1]


def measured_ratios(report: Report, names: Sequence[str]) -> dict[str, float]:
    """A measure of each row divided by the full cache's of the same model."""
    out = {}
    for row in report.rows:
        base = next(
            (
                o
                for o in report.rows
                if o.first.is_full_cache and o.first.model == row.first.model and o.measure(*names)
            ),
            None,
        )
        mine, theirs = row.measure(*names), base.measure(*names) if base else None
        if mine and theirs and theirs["median"]:
            out[row.label] = mine["median"] / theirs["median"]
    return out


def changes(report: Report, columns: Sequence[Column]) -> dict[str, float]:
    """Mean change to the full cache in percent, over the tasks that both have; rows that lack one are left out."""
    out = {}
    for row in report.rows:
        changes = []
        for column in columns:
            base = report.base_of(row, column)
            mine, theirs = row.cells[column].value, base.cells[column].value if base else None
            if mine is not None and theirs:
                changes.append(100 * (mine / theirs - 1))
        if columns and len(changes) == len(columns):
            out[row.label] = math.fsum(changes) / len(changes)
    return out

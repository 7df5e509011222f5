"""What all pictures share: which rows and tasks have room, one colour a method, figures, and the numbers drawn."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kv_lm_eval.reporting.cells import Column, Report
from kv_lm_eval.reporting.plots import palette
from kv_lm_eval.reporting.plots.palette import AXIS, INK, PAPER

MAX_BARS = 24  # rows of a picture that has a line for each
MAX_PANELS = 12


@dataclass(frozen=True)
class Picture:
    """A figure, its name as a file, what it shows in a sentence, and the numbers drawn, below their names."""

    name: str
    title: str
    caption: str
    figure: Any
    numbers: list[Sequence[Any]] = field(default_factory=list)

    @property
    def csv(self) -> str:
        """The numbers, an empty field for what there is none of."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(self.numbers)
        return out.getvalue()


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches and its axes, without a frame above and to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color(AXIS)
        axis.set_facecolor(PAPER)
        axis.tick_params(colors=INK, labelsize=8, color=AXIS)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        axis.set_axisbelow(True)
    return figure, axes


def looks(report: Report) -> dict[str, tuple[str, str]]:
    """Label -> (colour, marker)."""
    methods = list(dict.fromkeys(row.first.method for row in report.rows if not row.first.is_full_cache))
    out = {}
    for row in report.rows:
        i = methods.index(row.first.method) if row.first.method in methods else -1
        out[row.label] = (INK, "s") if i < 0 else palette.look(i)
    return out


def shown_tasks(report: Report) -> list[Column]:
    """The columns for a picture: groups first where there are more than fit."""
    scored = [c for c in report.columns if any(row.cells[c].state == "scored" for row in report.rows)]
    return scored if len(scored) <= MAX_PANELS else sorted(scored, key=lambda c: not c.leaves)[:MAX_PANELS]


def left_out(report: Report) -> str:
    """A sentence on tasks that have no room."""
    tasks, shown = len({c.task for c in report.columns}), len({c.task for c in shown_tasks(report)})
    return f" {shown} of {tasks} tasks and groups, groups first." if shown < tasks and shown == MAX_PANELS else ""


def first_rows(report: Report, count: int) -> str:
    """A sentence on rows that have no room."""
    rows = len(report.rows)
    return f" The first {count} of {rows} rows; the numbers are of all." if rows > count else ""

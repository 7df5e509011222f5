"""What all pictures share: paper and ink, one colour a method, which tasks have room, text that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kv_lm_eval.reporting.cells import Column, Report

# Okabe and Ito's colours, told apart by colour-blind readers; then their darker kin.
COLOURS = (
    "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #7F3C8D #8C6D31 #3B528B #A0522D #5F9E6E #B22222 #708090 #B8860B"
).split()
MARKERS = "osD^vPX*<>hpd8"
INK, PAPER, GRID = "#1B1F24", "#FFFFFF", "#E3E6EA"
GOOD, BAD = "#1A7F5A", "#C23B32"
MAX_BARS = 24
MAX_PANELS = 12


@dataclass(frozen=True)
class Picture:
    """A figure, its name as a file, and what it shows in a sentence."""

    name: str
    title: str
    caption: str
    figure: Any


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches and its axes, without a frame above and to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color("#9AA1A9")
        axis.tick_params(colors=INK, labelsize=8, color="#9AA1A9")
        axis.set_axisbelow(True)
    return figure, axes


def looks(report: Report) -> dict[str, tuple[str, str]]:
    """Label -> (colour, marker)."""
    methods = list(dict.fromkeys(row.first.method for row in report.rows if not row.first.is_full_cache))
    out = {}
    for row in report.rows:
        i = methods.index(row.first.method) if row.first.method in methods else -1
        out[row.label] = (INK, "s") if i < 0 else (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
    return out


def shown_tasks(report: Report) -> list[Column]:
    """The columns for a picture: groups first where there are more than fit."""
    scored = [c for c in report.columns if any(row.cells[c].state == "scored" for row in report.rows)]
    return scored if len(scored) <= MAX_PANELS else sorted(scored, key=lambda c: not c.leaves)[:MAX_PANELS]


def left_out(report: Report) -> str:
    """A sentence on tasks that have no room."""
    tasks, shown = len({c.task for c in report.columns}), len({c.task for c in shown_tasks(report)})
    return f" {shown} of {tasks} tasks and groups, groups first." if shown < tasks and shown == MAX_PANELS else ""

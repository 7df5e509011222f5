"""A panel a task: score over the share of pairs kept, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kv_lm_eval import fit
from kv_lm_eval.reporting.cells import Report
from kv_lm_eval.reporting.plots import drawing
from kv_lm_eval.reporting.plots.drawing import Picture
from kv_lm_eval.reporting.plots.palette import FAINT, GRID, INK, PAPER


def pareto(points: Sequence[tuple[float, float]], higher_is_better: bool = True) -> list[tuple[float, float]]:
    """The points that no other beats, by growing first number (less is better) and ever better second number."""
    sign = 1 if higher_is_better else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda p: (p[0], -sign * p[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def draw(report: Report) -> Picture | None:
    """A panel a task: score over the share of pairs kept, with the Pareto front."""
    columns = [
        c
        for c in drawing.shown_tasks(report)
        if any(row.kept(c.leaves or (c.task,)) is not None for row in report.rows)
    ]
    if not columns:
        return None
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure, axes = drawing.new_figure(4.1 * across + 0.2, 3.3 * down + 0.9, down, across)
    looks = drawing.looks(report)
    handles: dict[str, Any] = {}
    numbers: list[Sequence[Any]] = [("method", "task", "metric", "pairs kept (%)", "score", "stderr")]
    for axis, column in zip(axes.flat, columns, strict=False):
        better = column.higher_is_better is not False
        points = []
        for row in report.rows:
            cell, kept = row.cells[column], row.kept(column.leaves or (column.task,))
            if cell.value is None or kept is None or cell.state != "scored":
                continue
            colour, marker = looks[row.label]
            hollow = cell.untouched
            points.append((100 * kept, cell.value))
            numbers.append((row.label, column.task, column.metric, 100 * kept, cell.value, cell.stderr))
            if cell.stderr:
                axis.errorbar(100 * kept, cell.value, cell.stderr, color=colour, lw=1, alpha=0.45, capsize=2, zorder=2)
            style = {"facecolors": PAPER if hollow else colour, "edgecolors": colour, "linewidths": 1.4}
            handle = axis.scatter(100 * kept, cell.value, s=42, marker=marker, zorder=3, **style)
            handles.setdefault("full cache" if row.first.is_full_cache else row.first.method, handle)
        front = pareto(points, better)
        if len(front) > 1:
            (line,) = axis.step(*zip(*front, strict=True), where="post", color=FAINT, lw=1.2, ls="--", zorder=1)
            handles["no run is smaller and better"] = line
        axis.set_title(
            fit.wrap(column.task, 3.2, 9.5, bold=True), fontsize=9.5, color=INK, loc="left", fontweight="bold"
        )
        axis.set_xlabel("pairs kept, %", fontsize=8)
        axis.set_ylabel(f"{column.metric} {column.arrow}", fontsize=8)
        axis.set_xlim(-3, 105)
        axis.grid(color=GRID, lw=0.8)
        if not better:
            axis.invert_yaxis()
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    fit.legend_below(figure, handles)
    caption = (
        "Up and left is better (axes of scores where less is better are turned over). Bars: standard error. Hollow: "
        "nothing was compressed. Dashed: the Pareto front."
    )
    caption += drawing.left_out(report)
    return Picture("score_against_kept", "Score against pairs kept", caption, figure, numbers)

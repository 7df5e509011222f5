"""Perplexity over compress_every, a line for each set of the other settings, where it was varied."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kv_lm_eval import fit
from kv_lm_eval.reporting.cells import Column, Report
from kv_lm_eval.reporting.plots import drawing, palette
from kv_lm_eval.reporting.plots.drawing import Picture
from kv_lm_eval.reporting.plots.palette import GRID, INK
from kv_lm_eval.reporting.run import is_number

MAX_LINES = 12  # with a name each


def draw(report: Report) -> Picture | None:
    """Perplexity over compress_every, a line for each set of the other settings, where it was varied."""
    columns = [c for c in drawing.shown_tasks(report) if c.higher_is_better is False and not c.leaves]
    found: list[tuple[Column, dict[str, list[tuple[float, float]]]]] = []
    for column in columns:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in report.rows:
            settings = dict(row.first.settings)
            every, value = _every(settings), row.cells[column].value
            if not every or value is None or row.first.is_full_cache:
                continue
            others = json.dumps([row.first.model, row.first.method, settings, row.variant], sort_keys=True, default=str)
            lines.setdefault(others, []).append((every, value))
        lines = {k: sorted(points) for k, points in lines.items() if len({x for x, _ in points}) > 1}
        if lines:
            found.append((column, lines))
    if not found:
        return None
    across = min(3, len(found))
    down = -(-len(found) // across)
    figure, axes = drawing.new_figure(4.6 * across, 3.5 * down + 0.8, down, across)
    everything = [key for _, lines in found for key in lines]
    names = _line_names(list(dict.fromkeys(everything)))
    for axis, (column, lines) in zip(axes.flat, found, strict=False):
        for i, (key, points) in enumerate(list(lines.items())[:MAX_LINES]):
            colour, marker = palette.look(i)
            axis.plot(
                *zip(*points, strict=True),
                marker=marker,
                color=colour,
                lw=1.5,
                label=fit.wrap(names[key], 3.2, 7.5),
            )
        bases = [row.cells[column].value for row in report.rows if row.first.is_full_cache]
        for value in dict.fromkeys(v for v in bases if v is not None):
            axis.axhline(value, color=INK, lw=1, ls="--", label="full cache")
        axis.set_xscale("log", base=2)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        axis.grid(color=GRID, lw=0.8)
        axis.set_title(
            fit.wrap(column.task, 3.6, 9.5, bold=True), fontsize=9.5, loc="left", fontweight="bold", color=INK
        )
        axis.set_xlabel("compress_every, tokens", fontsize=8.5)
        axis.set_ylabel(f"{column.metric} ↓", fontsize=8.5)
        axis.legend(fontsize=7.5, frameon=False, labelcolor=INK)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    caption = "Everything else equal along a line. Dashed: the full cache."
    if (most := max(len(lines) for _, lines in found)) > MAX_LINES:
        caption += f" The first {MAX_LINES} of {most} lines; the numbers are of all."
    numbers: list[Sequence[Any]] = [("settings", "task", "metric", "compress_every", "value")]
    for column, lines in found:
        numbers += [(names[key], column.task, column.metric, *point) for key, line in lines.items() for point in line]
    return Picture("compress_every", "Perplexity against compress_every", caption, figure, numbers)


def _every(settings: dict[str, Any]) -> float:
    """compress_every, or rolling_compress_every where only streamed texts are cut; both leave the settings."""
    every, rolling = settings.pop("compress_every", None), settings.pop("rolling_compress_every", None)
    return float(next((v for v in (every, rolling) if is_number(v) and v > 0), 0))


def _line_names(keys: Sequence[str]) -> dict[str, str]:
    parsed = {key: json.loads(key) for key in keys}
    flat = {k: {"model": p[0], "method": p[1], **p[2], **p[3]} for k, p in parsed.items()}
    names = dict.fromkeys(n for settings in flat.values() for n in settings)
    differing = [n for n in names if n != "method" and len({repr(s.get(n)) for s in flat.values()}) > 1]
    return {k: " ".join([s["method"], *(f"{n}={s[n]}" for n in differing if n in s)]) for k, s in flat.items()}

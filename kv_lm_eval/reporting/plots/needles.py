"""Heat-maps of every task whose documents have a context length and a depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kv_lm_eval.reporting.cells import Column, Report, Row
from kv_lm_eval.reporting.plots.drawing import Picture
from kv_lm_eval.reporting.run import is_number

MAX_PANELS = 24  # of one picture


def panels_of(report: Report) -> list[Any]:
    """Grids of every task whose documents have a context length and a depth, in the heat-map's own form."""
    from kv_lm_eval.tasks.needle import heatmap

    panels = []
    for column in report.columns:
        if column.leaves or any(c.task == column.task for c in report.columns[: report.columns.index(column)]):
            continue
        for row in report.rows:
            run = row.run_of(column.task)
            if run is None or run.state != "scored" or run.results_file is None:
                continue
            cells = next((v for k, v in run.tasks[column.task].items() if k.startswith("cells,") and v), None)
            cells = cells or _cells(row, column)
            if cells:
                panel = heatmap.panel_of(column.task, cells, run.config, run.results_file, column.metric)
                panels.append(replace(panel, label=_fold(row.label)))
    return panels


def _cells(row: Row, column: Column) -> list[dict[str, Any]]:
    """Cells as needle.scoring.grid makes them, for a task that does not report any."""
    places: dict[tuple[int, float], list[float]] = {}
    for sample in row.samples(column.task, column.filter).values():
        if sample.place is not None and is_number(sample.metrics.get(column.metric)):
            places.setdefault(sample.place, []).append(float(sample.metrics[column.metric]))
    if len({length for length, _ in places}) < 2 and len({depth for _, depth in places}) < 2:
        return []
    return [
        {
            "context_length": length,
            "document_depth_percent": depth,
            "samples": len(values),
            "length_tokens": length,
            "primary": column.metric,
            "scores": {column.metric: math.fsum(values) / len(values)},
            "floor": None,
            "failed": {},
        }
        for (length, depth), values in sorted(places.items())
    ]


def _fold(label: str) -> str:
    """A label on several lines, for the title of a narrow panel."""
    return label.replace(" ", "\n")


def draw(panels: Sequence[Any]) -> list[Picture]:
    """One picture a task, all methods side by side."""
    from kv_lm_eval.tasks.needle import heatmap

    out = []
    for task in dict.fromkeys(panel.task for panel in panels):
        of_task = heatmap.in_order([panel for panel in panels if panel.task == task])
        caption = "Depth of the needle down, length of the context across; yellow is found, dark blue is lost."
        if len(of_task) > MAX_PANELS:
            caption += f" The first {MAX_PANELS} of {len(of_task)} methods; the numbers are of all."
        numbers: list[Sequence[Any]] = [("method", "context length", "depth (%)", "samples", "score", "state")]
        for panel in of_task:
            places = ("context_length", "document_depth_percent", "samples", "score", "state")
            numbers += [(" ".join(panel.label.split()), *(cell[k] for k in places)) for cell in panel.cells]
        figure = heatmap.draw(of_task[:MAX_PANELS], colours="viridis")
        out.append(Picture(f"needle_{task}", f"Needle: {task}", caption, figure, numbers))
    return out

"""All measures relative to the full cache, as a coloured table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kv_lm_eval import fit
from kv_lm_eval.reporting.cells import Report
from kv_lm_eval.reporting.plots import drawing, relative
from kv_lm_eval.reporting.plots.drawing import Picture
from kv_lm_eval.reporting.plots.palette import CHANGE, FAINT, ON_LIGHT

MAX_ROWS = 48


def draw(report: Report) -> Picture | None:
    """All measures relative to the full cache, as a coloured table."""
    from matplotlib.colors import LinearSegmentedColormap

    measures = relative.relatives(report)
    rows = [row for row in report.rows if any(row.label in m.ratios for m in measures)]
    if not measures or len(rows) < 2:
        return None
    colours = LinearSegmentedColormap.from_list("change", CHANGE)
    rows = rows[:MAX_ROWS]
    labels = [fit.wrap(row.label, 4.5, 8.5) for row in rows]
    longest = max(fit.inches(label, 8.5) for label in labels)
    figure, axes = drawing.new_figure(1.25 * len(measures) + longest + 0.3, 0.36 * len(rows) + 1.5)
    axis = axes[0, 0]
    for y, row in enumerate(rows):
        for x, measure in enumerate(measures):
            ratio = measure.ratios.get(row.label)
            if ratio is None:
                axis.text(x, y, "N/A", ha="center", va="center", fontsize=8, color=FAINT)
                continue
            gain = math.log2(max(ratio, 1e-3)) * (1 if measure.higher_is_better else -1)
            face = colours(0.5 + max(-1.0, min(1.0, gain / 2)) / 2)
            axis.add_patch(_rectangle(x, y, face))
            axis.text(
                x,
                y,
                f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×",
                ha="center",
                va="center",
                fontsize=8.5,
                color=ON_LIGHT,
            )
    axis.set_xlim(-0.5, len(measures) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks(range(len(measures)), [fit.wrap(m.name, 1.15, 7.5) for m in measures], fontsize=7.5)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(rows)), labels, fontsize=8.5)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    caption = (
        "Everything divided by the full cache's. Blue is better, orange is worse, full colour at a factor of four."
    )
    caption += drawing.left_out(report) + drawing.first_rows(report, MAX_ROWS)
    numbers: list[Sequence[Any]] = [("method", "measure", "of the full cache's")]
    numbers += [(label, " ".join(m.name.split()), ratio) for m in measures for label, ratio in m.ratios.items()]
    return Picture("summary", "Normalised summary", caption, figure, numbers)


def _rectangle(x: float, y: float, face: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.45), 0.96, 0.9, facecolor=face, linewidth=0)

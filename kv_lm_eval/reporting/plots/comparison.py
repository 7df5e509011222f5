"""Bars of TTFT, TPOT, throughput, memory and perplexity, as far as they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kv_lm_eval import fit
from kv_lm_eval.reporting import tables
from kv_lm_eval.reporting.cells import Report
from kv_lm_eval.reporting.plots import drawing, relative
from kv_lm_eval.reporting.plots.drawing import MAX_BARS, Picture
from kv_lm_eval.reporting.plots.palette import FAINT, GRID, INK


def draw(report: Report) -> Picture | None:
    """Bars of TTFT, TPOT, throughput, memory and perplexity, as far as they were measured."""
    panels: list[tuple[str, dict[str, tuple[float, float, float]]]] = []  # by label: value, low, high
    for measure in tables.MEASURES:
        if measure.title in ("KV at the end", "KV allocated", "overhead"):
            continue
        bars = {}
        for row in report.rows:
            if found := row.measure(*measure.names):
                middle = found["median"]
                low, high = found.get("p10", middle), found.get("p90", middle)
                bars[row.label] = (middle * measure.factor, low * measure.factor, high * measure.factor)
        panels.append((f"{measure.title}, {measure.unit} {'↑' if measure.higher_is_better else '↓'}", bars))
        if measure.title in ("TTFT", "throughput"):
            ratios = relative.measured_ratios(report, measure.names)
            sign, what = (1, "throughput change") if measure.higher_is_better else (-1, "TTFT gain")
            changes = {label: sign * 100 * (ratio - 1) for label, ratio in ratios.items()}
            panels.append((f"{what}, % ↑", {label: (c, c, c) for label, c in changes.items()}))
    for column in drawing.shown_tasks(report):
        if column.higher_is_better is False and not column.leaves:
            bars = {r.label: (v, v, v) for r in report.rows if (v := r.cells[column].value) is not None}
            panels.append((f"{column.task}\n{column.metric} ↓", bars))
    panels = [(name, bars) for name, bars in panels if bars]
    rows = report.rows[:MAX_BARS]
    if not panels:
        return None
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    labels = [fit.wrap(row.label, 3.5, 8) for row in rows]
    longest = max(fit.inches(label, 8) for label in labels)
    figure, axes = drawing.new_figure(3.0 * across + longest + 0.2, (0.27 * len(rows) + 0.9) * down + 0.2, down, across)
    looks = drawing.looks(report)
    for i, axis in enumerate(axes.flat):
        if i >= len(panels):
            axis.set_visible(False)
            continue
        name, bars = panels[i]
        widest = max((abs(v[2]) for v in bars.values()), default=1) or 1
        for y, row in enumerate(rows):
            if row.label not in bars:
                axis.text(0.02, y, "N/A", va="center", fontsize=7.5, color=FAINT, transform=axis.get_yaxis_transform())
                continue
            value, low, high = bars[row.label]
            colour = looks[row.label][0]
            axis.barh(y, value, height=0.68, color=colour, alpha=0.88)
            if high > low:
                axis.errorbar(
                    value, y, xerr=[[max(0, value - low)], [max(0, high - value)]], color=INK, lw=1, capsize=2
                )
            axis.text(
                max(high, value, 0) + 0.02 * widest, y, _digits(value, widest), va="center", fontsize=7.5, color=INK
            )
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_yticks(range(len(rows)), labels if i % across == 0 else [""] * len(rows), fontsize=8)
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.18)
        axis.grid(axis="x", color=GRID, lw=0.8)
        axis.set_title(fit.wrap(name, 2.6, 9, bold=True), fontsize=9, color=INK, loc="left", fontweight="bold")
    caption = (
        "Medians, with lines from the 10th to the 90th percentile where there are several requests. N/A: not measured."
    )
    caption += drawing.first_rows(report, MAX_BARS)
    numbers: list[Sequence[Any]] = [("method", "measure", "value", "low", "high")]
    numbers += [(label, " ".join(name.split()), *bar) for name, bars in panels for label, bar in bars.items()]
    return Picture("comparison", "Time, memory and perplexity", caption, figure, numbers)


def _digits(value: float, widest: float) -> str:
    text = f"{value:,.0f}" if widest >= 100 else tables.number(value, widest)
    return text.replace("-", "") if float(text.replace(",", "")) == 0 else text.replace("-", "−")

"""A report's pictures: matplotlib figures by name, each left out where its numbers are not there.

One colour a method in all of them, a darker shade for a larger budget; the full cache is black.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kv_lm_eval.reporting import tables
from kv_lm_eval.reporting.load import is_number
from kv_lm_eval.reporting.rows import Column, Report, Row
from kv_lm_eval.reporting.tables import Table

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


def all_of(report: Report, needle_panels: Sequence[Any] = ()) -> list[Picture]:
    """Every picture that the report has numbers for."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in a name is a dollar
        made = [
            score_against_kept(report),
            trade_off(report),
            summary(report),
            comparison(report),
            against_compress_every(report),
            *heat_maps(needle_panels),
            table_as_picture(tables.scores(report)),
        ]
    return [picture for picture in made if picture is not None]


# ---------------------------------------------------------------------------------------------- shared


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
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


def _looks(report: Report) -> dict[str, tuple[str, str]]:
    """Label -> (colour, marker)."""
    methods = list(dict.fromkeys(row.first.method for row in report.rows if not row.first.is_full_cache))
    out = {}
    for row in report.rows:
        i = methods.index(row.first.method) if row.first.method in methods else -1
        out[row.label] = (INK, "s") if i < 0 else (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
    return out


def _short(row: Row) -> str:
    """A label for the inside of a picture: the method, and its settings without their names if they are long."""
    words = row.label.split()
    if len(row.label) <= 30:
        return row.label
    return " ".join([words[0], *(w.split("=", 1)[-1] for w in words[1:])])


def _tasks(report: Report) -> list[Column]:
    """The columns for a picture: groups first where there are more than fit."""
    scored = [c for c in report.columns if any(row.cells[c].state == "scored" for row in report.rows)]
    return scored if len(scored) <= MAX_PANELS else sorted(scored, key=lambda c: not c.leaves)[:MAX_PANELS]


def _left_out(report: Report) -> str:
    tasks, shown = len({c.task for c in report.columns}), len({c.task for c in _tasks(report)})
    return f" {shown} of {tasks} tasks and groups, groups first." if shown < tasks and shown == MAX_PANELS else ""


def pareto(points: Sequence[tuple[float, float]], higher_is_better: bool = True) -> list[tuple[float, float]]:
    """The points that no other beats, by growing first number (less is better) and ever better second number."""
    sign = 1 if higher_is_better else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda p: (p[0], -sign * p[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


# ---------------------------------------------------------------------------------------------- score against size


def score_against_kept(report: Report) -> Picture | None:
    """A panel a task: score over the share of pairs kept, with the Pareto front."""
    columns = [c for c in _tasks(report) if any(row.kept(c.leaves or (c.task,)) is not None for row in report.rows)]
    if not columns:
        return None
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure, axes = _figure(4.1 * across + 0.2, 3.3 * down + 0.9, down, across)
    looks = _looks(report)
    handles: dict[str, Any] = {}
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
            if cell.stderr:
                axis.errorbar(100 * kept, cell.value, cell.stderr, color=colour, lw=1, alpha=0.45, capsize=2, zorder=2)
            style = {"facecolors": PAPER if hollow else colour, "edgecolors": colour, "linewidths": 1.4}
            handle = axis.scatter(100 * kept, cell.value, s=42, marker=marker, zorder=3, **style)
            handles.setdefault("full cache" if row.first.is_full_cache else row.first.method, handle)
        front = pareto(points, better)
        if len(front) > 1:
            (line,) = axis.step(*zip(*front, strict=True), where="post", color="#8A929B", lw=1.2, ls="--", zorder=1)
            handles["no run is smaller and better"] = line
        axis.set_title(column.task, fontsize=9.5, color=INK, loc="left", fontweight="bold")
        axis.set_xlabel("pairs kept, %", fontsize=8)
        axis.set_ylabel(f"{column.metric} {column.arrow}", fontsize=8)
        axis.set_xlim(-3, 105)
        axis.grid(color=GRID, lw=0.8)
        if not better:
            axis.invert_yaxis()
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(6, len(handles)),
        fontsize=8,
        frameon=False,
    )
    caption = (
        "Up and left is better (axes of scores where less is better are turned over). Bars: standard error. Hollow: "
        "nothing was compressed. Dashed: the Pareto front."
    )
    return Picture("score_against_kept", "Score against pairs kept", caption + _left_out(report), figure)


# ------------------------------------------------------------------------------------------ relative to the full cache


@dataclass(frozen=True)
class Relative:
    """One measure of all rows, relative to the full cache: 1 is the same."""

    name: str
    ratios: dict[str, float]  # by label
    higher_is_better: bool


def relatives(report: Report) -> list[Relative]:
    """Scores and measures divided by the full cache's; what has none is left out."""
    out = []
    for column in _tasks(report):
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


def summary(report: Report) -> Picture | None:
    """All measures relative to the full cache, as a coloured table."""
    from matplotlib.colors import LinearSegmentedColormap

    measures = relatives(report)
    rows = [row for row in report.rows if any(row.label in m.ratios for m in measures)]
    if not measures or len(rows) < 2:
        return None
    colours = LinearSegmentedColormap.from_list("change", ["#D9695F", "#F7F7F5", "#5FB58F"])
    longest = max(len(row.label) for row in rows)
    figure, axes = _figure(1.25 * len(measures) + 0.085 * longest + 0.6, 0.36 * len(rows) + 1.5)
    axis = axes[0, 0]
    for y, row in enumerate(rows):
        for x, measure in enumerate(measures):
            ratio = measure.ratios.get(row.label)
            if ratio is None:
                axis.text(x, y, "N/A", ha="center", va="center", fontsize=8, color="#8A929B")
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
                color=INK,
            )
    axis.set_xlim(-0.5, len(measures) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks(range(len(measures)), [_wrap(m.name, 16) for m in measures], fontsize=7.5)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8.5)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    caption = "Everything divided by the full cache's. Green is better, red is worse, full colour at a factor of four."
    return Picture("summary", "Normalised summary", caption + _left_out(report), figure)


def _rectangle(x: float, y: float, face: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.45), 0.96, 0.9, facecolor=face, linewidth=0)


def _wrap(text: str, width: int) -> str:
    """Breaks long names at underscores."""
    lines = []
    for line in text.split("\n"):
        current = ""
        for part in line.replace("_", "_\0").split("\0"):
            if current and len(current + part) > width:
                lines.append(current)
                current = ""
            current += part
        lines.append(current)
    return "\n".join(lines)


def trade_off(report: Report) -> Picture | None:
    """What is saved against what is lost: memory, and TTFT where it was measured, against scores."""
    panels = []
    scores = [c for c in _tasks(report) if c.higher_is_better is not False and not c.leaves]
    losses = [c for c in _tasks(report) if c.higher_is_better is False and not c.leaves]
    memory = measured_ratios(report, ("kv_bytes_prefill_mean",))
    time = measured_ratios(report, ("ttft_s",))
    for ratios, what in ((memory, "KV memory saved, %"), (time, "TTFT gain, %")):
        for columns, name in ((scores, "mean score change, %"), (losses, _names(losses) + " change, %")):
            changes = _changes(report, columns)
            points = {label: (100 * (1 - ratios[label]), changes[label]) for label in changes if label in ratios}
            if len({x for x, _ in points.values()}) > 1:
                panels.append((points, what, name, columns is losses))
    if not panels:
        return None
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure, axes = _figure(5.4 * across, 4.2 * down + 0.5, down, across)
    looks = _looks(report)
    methods = {row.label: row for row in report.rows}
    handles: dict[str, Any] = {}
    for axis, (points, across_name, down_name, less_is_better) in zip(axes.flat, panels, strict=False):
        for label, (x, y) in points.items():
            colour, marker = looks[label]
            row = methods[label]
            handle = axis.scatter(x, y, s=55, color=colour, marker=marker, zorder=3, alpha=0.9)
            handles.setdefault("full cache" if row.first.is_full_cache else row.first.method, handle)
            if len(points) <= 16 and not row.first.is_full_cache and (setting := _short(row).partition(" ")[2]):
                budget = setting.split("=")[-1]
                axis.annotate(budget, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=7.5, color=colour)
        axis.axhline(0, color="#8A929B", lw=1, zorder=1)
        axis.axvline(0, color="#8A929B", lw=1, zorder=1)
        axis.grid(color=GRID, lw=0.8)
        axis.set_xlabel(f"{across_name} (more is better)", fontsize=8.5)
        axis.set_ylabel(f"{down_name} ({'less' if less_is_better else 'more'} is better)", fontsize=8.5)
        if less_is_better:
            axis.invert_yaxis()
        axis.margins(0.1)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(6, len(handles)),
        fontsize=8,
        frameon=False,
    )
    caption = "Both relative to the full cache, which is where the lines cross. Up and right is better."
    return Picture("trade_off", "Trade-off", caption, figure)


def _names(columns: Sequence[Column]) -> str:
    return " and ".join(dict.fromkeys(c.metric for c in columns))


def _changes(report: Report, columns: Sequence[Column]) -> dict[str, float]:
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


# ---------------------------------------------------------------------------------------------- bars


def comparison(report: Report) -> Picture | None:
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
            ratios = measured_ratios(report, measure.names)
            sign, what = (1, "throughput change") if measure.higher_is_better else (-1, "TTFT gain")
            changes = {label: sign * 100 * (ratio - 1) for label, ratio in ratios.items()}
            panels.append((f"{what}, % ↑", {label: (c, c, c) for label, c in changes.items()}))
    for column in _tasks(report):
        if column.higher_is_better is False and not column.leaves:
            bars = {r.label: (v, v, v) for r in report.rows if (v := r.cells[column].value) is not None}
            panels.append((f"{column.task}\n{column.metric} ↓", bars))
    panels = [(name, bars) for name, bars in panels if bars]
    rows = report.rows[:MAX_BARS]
    if not panels:
        return None
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    longest = max(len(row.label) for row in rows)
    figure, axes = _figure(3.0 * across + 0.075 * longest, (0.27 * len(rows) + 0.9) * down + 0.2, down, across)
    looks = _looks(report)
    for i, axis in enumerate(axes.flat):
        if i >= len(panels):
            axis.set_visible(False)
            continue
        name, bars = panels[i]
        widest = max((abs(v[2]) for v in bars.values()), default=1) or 1
        for y, row in enumerate(rows):
            if row.label not in bars:
                axis.text(
                    0.02, y, "N/A", va="center", fontsize=7.5, color="#8A929B", transform=axis.get_yaxis_transform()
                )
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
        axis.set_yticks(range(len(rows)), [r.label for r in rows] if i % across == 0 else [""] * len(rows), fontsize=8)
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.18)
        axis.grid(axis="x", color=GRID, lw=0.8)
        axis.set_title(name, fontsize=9, color=INK, loc="left", fontweight="bold")
    caption = (
        "Medians, with lines from the 10th to the 90th percentile where there are several requests. N/A: not measured."
    )
    if len(report.rows) > MAX_BARS:
        caption += f" The first {MAX_BARS} of {len(report.rows)} rows."
    return Picture("comparison", "Time, memory and perplexity", caption, figure)


def _digits(value: float, widest: float) -> str:
    text = f"{value:,.0f}" if widest >= 100 else tables.number(value, widest)
    return text.replace("-", "") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


# ---------------------------------------------------------------------------------------------- a sweep's axis


def against_compress_every(report: Report) -> Picture | None:
    """Perplexity over compress_every, a line for each set of the other settings, where it was varied."""
    columns = [c for c in _tasks(report) if c.higher_is_better is False and not c.leaves]
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
    figure, axes = _figure(4.6 * across, 3.5 * down + 0.8, down, across)
    everything = [key for _, lines in found for key in lines]
    names = _line_names(list(dict.fromkeys(everything)))
    for axis, (column, lines) in zip(axes.flat, found, strict=False):
        for i, (key, points) in enumerate(lines.items()):
            axis.plot(
                *zip(*points, strict=True),
                marker=MARKERS[i % len(MARKERS)],
                color=COLOURS[i % len(COLOURS)],
                lw=1.5,
                label=names[key],
            )
        bases = [row.cells[column].value for row in report.rows if row.first.is_full_cache]
        for value in dict.fromkeys(v for v in bases if v is not None):
            axis.axhline(value, color=INK, lw=1, ls="--", label="full cache")
        axis.set_xscale("log", base=2)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        axis.grid(color=GRID, lw=0.8)
        axis.set_title(column.task, fontsize=9.5, loc="left", fontweight="bold", color=INK)
        axis.set_xlabel("compress_every, tokens", fontsize=8.5)
        axis.set_ylabel(f"{column.metric} ↓", fontsize=8.5)
        axis.legend(fontsize=7.5, frameon=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    caption = "Everything else equal along a line. Dashed: the full cache."
    return Picture("compress_every", "Perplexity against compress_every", caption, figure)


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


# ---------------------------------------------------------------------------------------------- needles, the table


def needle_panels(report: Report) -> list[Any]:
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


def heat_maps(panels: Sequence[Any]) -> list[Picture]:
    """One picture a task, all methods side by side."""
    from kv_lm_eval.tasks.needle import heatmap

    out = []
    for task in dict.fromkeys(panel.task for panel in panels):
        of_task = heatmap.in_order([panel for panel in panels if panel.task == task])
        caption = "Depth of the needle down, length of the context across; green is found, red is lost."
        out.append(Picture(f"needle_{task}", f"Needle: {task}", caption, heatmap.draw(of_task)))
    return out


def table_as_picture(table: Table) -> Picture:
    """The table of scores, to paste where text cannot go."""
    from matplotlib.font_manager import FontProperties

    heads = [f"{name}\n{unit}" if unit else name for name, unit in table.head]
    texts = [[_wrap(h, 18) for h in heads], *([v.text for v in row] for row in table.rows)]
    tones = [["head"] * len(heads), *([v.tone for v in row] for row in table.rows)]
    widths = [max(max(map(len, t.split("\n"))) for t in column) for column in zip(*texts, strict=True)]
    inches = [0.085 * w + 0.22 for w in widths]
    tall = 0.19 * max(t.count("\n") + 1 for t in texts[0]) + 0.15
    height = tall + 0.3 * len(table.rows)
    figure, axes = _figure(sum(inches) + 0.2, height + 0.2)
    axis = axes[0, 0]
    axis.set_axis_off()
    axis.set_xlim(0, sum(inches))
    axis.set_ylim(height, 0)
    colours = {"better": GOOD, "worse": BAD, "bad": BAD}
    y = 0.0
    for i, (line, tone) in enumerate(zip(texts, tones, strict=True)):
        step = tall if i == 0 else 0.3
        if i and i % 2 == 0:
            axis.axhspan(y, y + step, color="#F4F6F8", lw=0)
        x = 0.0
        for j, (text, width) in enumerate(zip(line, inches, strict=True)):
            bold = FontProperties(weight="bold" if i == 0 else "normal", size=8.5)
            place, align = (x + 0.08, "left") if j == 0 else (x + width - 0.08, "right")
            axis.text(
                place, y + step / 2, text, ha=align, va="center", fontproperties=bold, color=colours.get(tone[j], INK)
            )
            x += width
        y += step
        if i == 0:
            axis.axhline(y, color=INK, lw=1)
    caption = "Green and red: outside noise, see the differences. " + table.legend
    return Picture("table", "The table as a picture", caption, figure)


def write(picture: Picture, folder: Path) -> list[Path]:
    """NAME.png and NAME.svg, the same bytes for the same numbers."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{picture.name}.png", folder / f"{picture.name}.svg"]
    with matplotlib.rc_context({"svg.hashsalt": "kv-lm-eval"}):
        picture.figure.savefig(files[0], dpi=130, metadata={"Software": None})
        picture.figure.set_layout_engine("none")  # it is laid out, and that is most of the time
        picture.figure.savefig(files[1], metadata={"Date": None})
    return files

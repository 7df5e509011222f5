"""What is saved against what is lost: memory, and TTFT where it was measured, against scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kv_lm_eval import fit
from kv_lm_eval.reporting import configuration
from kv_lm_eval.reporting.cells import Column, Report, Row
from kv_lm_eval.reporting.plots import drawing, relative
from kv_lm_eval.reporting.plots.drawing import Picture
from kv_lm_eval.reporting.plots.palette import FAINT, GRID

MAX_NAMED = 24  # points of a panel with their settings beside them
# Where a name may stand: points to the right and up of its place, and which of its corners is there; nearest first.
SIDES = [
    (
        7 * right * far,
        (4 if right else 9) * up * far,
        ("right", "center", "left")[right + 1],
        "bottom" if up > 0 else "top",
    )
    for far in (1, 2.2, 3.5)
    for up in (1, -1)
    for right in (1, -1, 0)
]


def draw(report: Report) -> Picture | None:
    """What is saved against what is lost: memory, and TTFT where it was measured, against scores."""
    panels: list[tuple[dict[str, tuple[float, float]], str, str, bool]] = []
    scores = [c for c in drawing.shown_tasks(report) if c.higher_is_better is not False and not c.leaves]
    losses = [c for c in drawing.shown_tasks(report) if c.higher_is_better is False and not c.leaves]
    memory = relative.measured_ratios(report, ("kv_bytes_prefill_mean",))
    time = relative.measured_ratios(report, ("ttft_s",))
    for ratios, what in ((memory, "KV memory saved, %"), (time, "TTFT gain, %")):
        for columns, name in ((scores, "mean score change, %"), (losses, _names(losses) + " change, %")):
            changes = relative.changes(report, columns)
            points = {label: (100 * (1 - ratios[label]), changes[label]) for label in changes if label in ratios}
            if len({x for x, _ in points.values()}) > 1:
                panels.append((points, what, name, columns is losses))
    if not panels:
        return None
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure, axes = drawing.new_figure(5.4 * across, 4.2 * down + 0.5, down, across)
    looks = drawing.looks(report)
    methods = {row.label: row for row in report.rows}
    handles: dict[str, Any] = {}
    for axis, (points, across_name, down_name, less_is_better) in zip(axes.flat, panels, strict=False):
        for label, (x, y) in points.items():
            colour, marker = looks[label]
            row = methods[label]
            handle = axis.scatter(x, y, s=55, color=colour, marker=marker, zorder=3, alpha=0.9)
            handles.setdefault("full cache" if row.first.is_full_cache else row.first.method, handle)
        axis.axhline(0, color=FAINT, lw=1, zorder=1)
        axis.axvline(0, color=FAINT, lw=1, zorder=1)
        axis.grid(color=GRID, lw=0.8)
        axis.set_xlabel(f"{across_name} (more is better)", fontsize=8.5)
        better = "less" if less_is_better else "more"
        axis.set_ylabel(fit.wrap(f"{down_name} ({better} is better)", 3.6, 8.5), fontsize=8.5)
        if less_is_better:
            axis.invert_yaxis()
        axis.margins(0.1)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    fit.legend_below(figure, handles)
    figure.draw_without_rendering()  # places are known from here on
    names = _names_of_points(report.rows)
    for axis, (points, *_) in zip(axes.flat, panels, strict=False):
        if len(points) <= MAX_NAMED:
            _write_names(axis, points, names, looks)
    caption = "Both relative to the full cache, which is where the lines cross. Up and right is better."
    numbers: list[Sequence[Any]] = [("method", "saved", "saved (%)", "score", "change (%)")]
    numbers += [(label, what, x, name, y) for points, what, name, _ in panels for label, (x, y) in points.items()]
    return Picture("trade_off", "Trade-off", caption, figure, numbers)


def _names_of_points(rows: Sequence[Row]) -> dict[str, str]:
    """By label: in which settings a method's points differ, "" where it has one point; the value alone of one."""
    out = {}
    for row in rows:
        twins = [r for r in rows if (r.first.model, r.first.method) == (row.first.model, row.first.method)]
        own = {**row.first.settings, **row.variant}
        differing = configuration.differing([{**twin.first.settings, **twin.variant} for twin in twins])
        parts = {name: configuration.shown(own[name]) for name in differing if own.get(name) is not None}
        alone = len(parts) == 1 and set(parts) <= set(configuration.BUDGETS)
        named = "\n".join(parts.values() if alone else (f"{name}={value}" for name, value in parts.items()))
        out[row.label] = "" if row.first.is_full_cache else named
    return out


def _write_names(
    axis: Any,
    points: dict[str, tuple[float, float]],
    names: dict[str, str],
    looks: dict[str, tuple[str, str]],
) -> None:
    """Each beside its point, on the side where it covers least of other points and names; "" is not written."""
    from matplotlib.transforms import Bbox

    pixels = {label: axis.transData.transform(place) for label, place in points.items()}
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in pixels.values()]
    inside = axis.get_window_extent()
    for label in points:
        best = None
        for dx, dy, across, up in SIDES if names[label] else ():
            text = axis.annotate(
                names[label],
                points[label],
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=7,
                color=looks[label][0],
                ha=across,
                va=up,
                linespacing=1.0,
            )
            box = text.get_window_extent()
            cost = sum(_shared(box, other) for other in taken) + 10 * (_area(box) - _shared(box, inside))
            if best is None or cost < best[0]:
                if best:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
        if best:
            taken.append(best[2])


def _area(box: Any) -> float:
    return float(max(0, box.width) * max(0, box.height))


def _shared(a: Any, b: Any) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(0, width) * max(0, height))


def _names(columns: Sequence[Column]) -> str:
    return " and ".join(dict.fromkeys(c.metric for c in columns))

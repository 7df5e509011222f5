"""KL against bytes, with what no other method beats, and KL by the distance from the first eviction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kv_lm_eval import fit
from kv_lm_eval.reporting import fidelity
from kv_lm_eval.reporting.cells import Report
from kv_lm_eval.reporting.fidelity import Measured
from kv_lm_eval.reporting.plots import drawing
from kv_lm_eval.reporting.plots.drawing import MAX_BARS, Picture
from kv_lm_eval.reporting.plots.palette import FAINT, GRID, INK
from kv_lm_eval.reporting.run import is_number

LEAST = 1e-12  # nats that are still drawn on a logarithmic axis
FLOORS = {"chunking": ":", "bfloat16": "--"}
FILLS, STYLES = (1.0, 0.0, 0.4), ("-", "--", "-.", ":")  # of the first, second, ... setting of a method


def draw(report: Report) -> list[Picture]:
    """Both pictures, where there are numbers for them."""
    found = fidelity.measured(report)
    tasks = list(dict.fromkeys(one.task for one in found))[: drawing.MAX_PANELS]
    by_task = {task: [one for one in found if one.task == task] for task in tasks}
    return [p for p in (_against_bytes(report, by_task), _by_distance(report, by_task)) if p is not None]


def _against_bytes(report: Report, by_task: dict[str, list[Measured]]) -> Picture | None:
    points = {
        task: [one for one in ones if one.bytes and one.kl is not None and one.kl > LEAST]
        for task, ones in by_task.items()
    }
    points = {task: ones for task, ones in points.items() if ones}
    if not points:
        return None
    figure, axes = _panels(len(points))
    looks, handles, place = drawing.looks(report), dict[str, Any](), _places(report)
    for axis, (task, ones) in zip(axes.flat, points.items(), strict=False):
        for one in ones:
            assert one.bytes is not None and one.kl is not None
            colour, marker = looks[one.row.label]
            low, high = one.along.get("kl_low"), one.along.get("kl_high")
            if is_number(low) and is_number(high):
                axis.plot([one.bytes / 1024] * 2, [max(low, LEAST), high], color=colour, lw=1, alpha=0.6)
            face = (colour, FILLS[place[one.row.label] % len(FILLS)])
            handles[_name(report, one)] = axis.scatter(
                one.bytes / 1024, one.kl, s=45, facecolor=face, edgecolor=colour, marker=marker, zorder=3
            )
        front = _front([(one.bytes or 0.0, one.kl or 0.0) for one in ones])
        axis.step([x / 1024 for x, _ in front], [y for _, y in front], where="post", color=FAINT, lw=1, zorder=1)
        axis.set_xscale("log", base=2)
        _finish(axis, task, "KV, KiB a request (less is better)", by_task[task], [one.kl or 0 for one in ones], handles)
    _hide(axes, len(points))
    fit.legend_below(figure, handles)
    caption = (
        "Mean KL to the full cache, with its 95 % interval, against the bytes of the cache. Grey: what no run with as "
        "few bytes is below. Lines across: the full cache against itself, the noise floor, where it is not "
        "far below."
    )
    numbers: list[Sequence[Any]] = [("method", "task", "bytes", "KL (nats)", "low", "high")]
    for task, ones in points.items():
        numbers += [(o.row.label, task, o.bytes, o.kl, o.along.get("kl_low"), o.along.get("kl_high")) for o in ones]
    return Picture("kl_against_bytes", "KL against bytes", caption, figure, numbers)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of which none with as few bytes has a smaller divergence, by bytes."""
    out: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not out or y < out[-1][1]:
            out.append((x, y))
    return out


def _by_distance(report: Report, by_task: dict[str, list[Measured]]) -> Picture | None:
    lines = {task: [(one, _curve(one)) for one in ones if len(_curve(one)) > 1] for task, ones in by_task.items()}
    lines = {task: ones for task, ones in lines.items() if ones}
    if not lines:
        return None
    figure, axes = _panels(len(lines))
    looks, handles, place = drawing.looks(report), dict[str, Any](), _places(report)
    for axis, (task, ones) in zip(axes.flat, lines.items(), strict=False):
        for one, curve in ones[:MAX_BARS]:
            colour, marker = looks[one.row.label]
            x = [1 + (stretch["from"] + stretch["to"]) / 2 for stretch in curve]
            (handles[one.row.label],) = axis.plot(
                x,
                [max(stretch["mean"], LEAST) for stretch in curve],
                color=colour,
                marker=marker,
                mec=colour,
                mfc=(colour, FILLS[place[one.row.label] % len(FILLS)]),
                ls=STYLES[place[one.row.label] % len(STYLES)],
                ms=4,
                lw=1.3,
            )
            sure = [(at, s) for at, s in zip(x, curve, strict=True) if is_number(s["low"]) and is_number(s["high"])]
            if sure:
                ends = [[max(s[end], LEAST) for _, s in sure] for end in ("low", "high")]
                axis.fill_between([at for at, _ in sure], *ends, color=colour, alpha=0.12, lw=0)
        axis.set_xscale("log", base=2)
        across = "tokens since the first eviction" if "by_distance" in ones[0][0].numbers else "token of the answer"
        _finish(axis, task, across, by_task[task], [s["mean"] for _, curve in ones for s in curve], handles)
    _hide(axes, len(lines))
    fit.legend_below(figure, handles)
    caption = (
        "Mean KL to the full cache by the distance from the first eviction, of texts, or by the place in the answer, "
        "whose prompt was cut before it. Shaded: 95 % interval, where there are tokens enough."
    )
    if (most := max(map(len, lines.values()))) > MAX_BARS:
        caption += f" The first {MAX_BARS} of {most} methods; the numbers are of all."
    numbers: list[Sequence[Any]] = [("method", "task", "from", "to", "KL (nats)", "low", "high")]
    for task, drawn in lines.items():
        of_one = [(one.row.label, s) for one, curve in drawn for s in curve]
        numbers += [(label, task, s["from"], s["to"], s["mean"], s["low"], s["high"]) for label, s in of_one]
    return Picture("kl_by_distance", "KL by distance since the eviction", caption, figure, numbers)


def _name(report: Report, one: Measured) -> str:
    """In the legend: of the row, or of its method where there are many rows."""
    return one.row.label if len(report.rows) <= MAX_BARS else one.row.first.method


def _curve(one: Measured) -> list[dict[str, Any]]:
    found = one.numbers.get("by_distance" if "by_distance" in one.numbers else "by_position") or []
    return [stretch for stretch in found if is_number(stretch["mean"])] if one.kl is not None and one.kl > LEAST else []


def _panels(count: int) -> tuple[Any, Any]:
    across = min(2, count)
    down = -(-count // across)
    return drawing.new_figure(5.4 * across, 4.0 * down + 0.6, down, across)


def _places(report: Report) -> dict[str, int]:
    """By label: which setting of its method a row is."""
    before: dict[str, int] = {}
    out = {}
    for row in report.rows:
        out[row.label] = before.get(row.first.method, 0)
        before[row.first.method] = out[row.label] + 1
    return out


def _finish(
    axis: Any, task: str, across: str, ones: Sequence[Measured], values: Sequence[float], handles: dict[str, Any]
) -> None:
    """Names, the noise floors, and a scale on which a floor of rounding alone, far below all, takes no room."""
    floors = {kind: max(known) for kind in FLOORS if (known := [f for o in ones if (f := o.floor(kind)) is not None])}
    above = [value for value in values if value > 100 * floors.get("chunking", 0.0)]
    least = max(LEAST, min([*(above or values), *([floors["bfloat16"]] if "bfloat16" in floors else [])]) / 3)
    for kind, floor in floors.items():
        if floor >= least:
            handles[f"noise floor, {kind}"] = axis.axhline(floor, color=INK, lw=1, ls=FLOORS[kind], zorder=1)
    axis.set_yscale("log")
    axis.set_ylim(bottom=least)
    axis.grid(color=GRID, lw=0.8)
    axis.set_title(fit.wrap(task, 4.4, 9.5, bold=True), fontsize=9.5, loc="left", fontweight="bold", color=INK)
    axis.set_xlabel(across, fontsize=8.5)
    axis.set_ylabel("KL, nats a token ↓", fontsize=8.5)


def _hide(axes: Any, used: int) -> None:
    for axis in axes.flat[used:]:
        axis.set_visible(False)

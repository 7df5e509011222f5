"""Heat-maps and RULER's numbers beside lm-eval's results file (kv_lm_eval/reports.py).

Each run gets its own files; and because all methods of a model share one folder, a second set of heat-maps compares the
latest run of every method setting that was asked the same grid.
"""

from __future__ import annotations

from pathlib import Path

from . import heatmap
from .heatmap import Panel
from .ruler import report as ruler


def write(results_file: Path) -> str:
    """Writes what belongs beside a results file; returns what to print, "" without a needle or RULER task."""
    return "\n".join(said for said in (_heat_maps(results_file), ruler.write(results_file)) if said)


def _heat_maps(results_file: Path) -> str:
    try:
        panels = heatmap.read([results_file])
    except ValueError:
        return ""
    date = results_file.stem.removeprefix("results_")
    said = []
    for panel in panels:
        folder = results_file.parent
        picture = heatmap.write([panel], folder / f"{panel.task}_{date}")[0]
        mean = "none" if panel.mean is None else f"{panel.mean:.2f}"
        floor = "" if panel.floor is None else f", without the needle {panel.floor:.2f}"
        said.append(f"{panel.task}, {panel.label}: {panel.metric} {mean}{floor}\n{heatmap.as_text(panel)}")
        if any(c["state"] == "not compressed" for c in panel.cells):
            said.append("  * the prompt fits the budget: nothing was compressed")
        said.append(f"  heat-map: {picture} (and .svg, .csv, .json)")
        if len(compared := _comparable(panel, folder)) > 1:
            picture = heatmap.write(compared, folder / f"{panel.task}_compared")[0]
            said.append(f"  {len(compared)} methods side by side: {picture}")
    return "\n".join(said)


def _comparable(panel: Panel, folder: Path) -> list[Panel]:
    """The latest panel of every method setting in the folder that was asked the same as this one."""
    latest: dict[str, Panel] = {}
    for file in sorted(folder.glob("results_*.json")):
        try:
            others = heatmap.read([file], None)
        except (ValueError, KeyError):
            continue
        for other in others:
            if other.same_grid(panel):
                latest[repr((other.method, sorted(other.settings.items(), key=repr)))] = other
    return heatmap.in_order(list(latest.values()))

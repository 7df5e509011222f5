"""Heat-maps of needle grids: depth down, context length across, one scale from 0 to 1, methods side by side.

The grid is data first: panels are read from lm-eval's results files (or, for what they lack, samples files), written
as CSV and JSON, and only then drawn. Full caches come first. A cell is a mean score, "OOM" where its requests ran out
of memory, or hatched grey where the prompt fits the budget, so that nothing was compressed.

Reference: gkamradt/LLMTest_NeedleInAHaystack, viz (colours, axes). Deviations: the scale is 0 to 1, not a judge's 1 to
10; viridis on request, for readers who do not tell red from green.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files, fit
from kv_lm_eval.errors import UserError

from .scoring import grid

CLASSIC = ("#F0496E", "#EBB839", "#0CD79F")
COLOURS = ("classic", "viridis")
UNCOMPRESSED = ("full", "no_cache", "hf")
GREY, DARK = "#D9D9D9", "#404040"
INK, PAPER = "#1B1F24", "#FFFFFF"  # of what stands beside the panels
BLACK, WHITE = "#111418", "#FEFEFE"  # of words on a cell
MAX_WIDTH_INCHES = 18.0
MAX_PANEL_INCHES = 2.4  # of the words above a panel, then they are wrapped
MORE = ConfigDict(extra="allow")


@dataclass(frozen=True)
class Panel:
    """One grid: a task under one method."""

    task: str
    metric: str
    model: str
    method: str
    label: str  # method and budget
    settings: dict[str, Any]
    cells: list[dict[str, Any]]  # as scoring.grid makes them, score and state added
    results_file: str

    @property
    def lengths(self) -> list[int]:
        """Columns."""
        return sorted({c["context_length"] for c in self.cells})

    @property
    def depths(self) -> list[float | None]:
        """Rows, the beginning of the text first; [None] for a task without depth."""
        return sorted({c["document_depth_percent"] for c in self.cells}, key=lambda d: -1 if d is None else d)

    def cell(self, depth: float | None, length: int) -> dict[str, Any] | None:
        """The cell at a place of the grid."""
        return next(
            (c for c in self.cells if (c["document_depth_percent"], c["context_length"]) == (depth, length)), None
        )

    def matrix(self) -> list[list[float | None]]:
        """Scores, row by row; None where there is none (never 0)."""
        rows = [[self.cell(depth, length) for length in self.lengths] for depth in self.depths]
        return [[cell["score"] if cell else None for cell in row] for row in rows]

    @property
    def mean(self) -> float | None:
        """Mean of the cells that have a score."""
        found = [c["score"] for c in self.cells if c["score"] is not None]
        return math.fsum(found) / len(found) if found else None

    @property
    def floor(self) -> float | None:
        """Mean score without the needle, where it was asked for."""
        found = [c["floor"] for c in self.cells if c["floor"] is not None]
        return math.fsum(found) / len(found) if found else None

    def same_grid(self, other: Panel) -> bool:
        """Whether both were asked the same: task, model, places, samples, prompt lengths."""

        def places(panel: Panel) -> list[tuple[Any, ...]]:
            keys = ("context_length", "document_depth_percent", "length_tokens")
            return [(*(c[k] for k in keys), c["samples"] + sum(c["failed"].values())) for c in panel.cells]

        return (self.task, self.metric, self.model) == (other.task, other.metric, other.model) and places(
            self
        ) == places(other)


# ---------------------------------------------------------------------------------------------- reading


class Cell(TypedDict):
    """A cell as scoring.grid makes it, in a results file."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    context_length: int
    document_depth_percent: float | None
    samples: int
    length_tokens: float
    primary: str
    scores: dict[str, float]
    floor: float | None
    failed: dict[str, int]


class Answer(TypedDict):
    """One answer's entry for the grid as scoring.process makes it, in a samples file."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    context_length: int
    document_depth_percent: float | None
    length_tokens: float
    needle_removed: bool
    primary: str
    failed: str | None
    scores: dict[str, float]


class Sample(TypedDict):
    """What is read of a samples file's line."""

    cells: Answer


class Results(TypedDict):
    """What is read of a results file."""

    results: NotRequired[dict[str, dict[str, Any]]]
    config: NotRequired[dict[str, Any]]


def read(paths: Sequence[Path | str], metric: str | None = None, left_out: list[str] | None = None) -> list[Panel]:
    """The panels of several results or samples files, full caches first.

    Args:
        paths: results_*.json or samples_*.jsonl of lm-eval, or folders, searched for results_*.json.
        metric: a score's name; None for each task's main one.
        left_out: takes the reason why a file in a folder was left out; where there is no list, that is an error.

    Raises:
        UserError: a damaged file, or one without a needle grid or without that score.
    """
    panels: list[Panel] = []
    for file in map(Path, paths):
        found = sorted(file.rglob("results_*.json")) if file.is_dir() else [file]
        of_file: list[Panel] = []
        for one in found:
            try:
                of_file += _read(one, metric)
            except UserError as error:
                if left_out is None or one == file:
                    raise
                left_out.append(str(error))
        if not of_file:
            raise UserError(
                f"{file} holds no needle grid: no task in it reports `cells`. Give the results of kv_needle tasks."
            )
        panels += of_file
    return in_order(panels)


def in_order(panels: Sequence[Panel]) -> list[Panel]:
    """Full caches first; labels that several settings of a task share get what tells them apart."""
    named = []
    for panel in panels:
        twins = [p for p in panels if (p.task, p.label) == (panel.task, panel.label)]
        differing = [k for k in panel.settings if len({repr(p.settings.get(k)) for p in twins}) > 1]
        extra = "".join(f"\n{k}={panel.settings[k]}" for k in differing)
        named.append(replace(panel, label=panel.label + extra))
    return sorted(named, key=lambda p: p.method not in UNCOMPRESSED)


def _read(file: Path, metric: str | None) -> list[Panel]:
    if file.suffix == ".jsonl":
        answers = _answers(file)
        if not answers:
            return []
        task, _, date = file.stem.removeprefix("samples_").rpartition("_")
        beside = file.with_name(f"results_{date}.json")
        config = files.read_json(beside, Results).get("config", {}) if beside.is_file() else {}
        return [panel_of(task, list(grid(answers)), config, file, metric)]
    results = files.read_json(file, Results)
    found = []
    for task, numbers in results.get("results", {}).items():
        name = next((k for k, v in numbers.items() if k.startswith("cells,") and isinstance(v, list) and v), None)
        if name is not None:
            cells = check_cells(numbers[name], f"{file}: results.{task}.{name}")
            found.append(panel_of(task, cells, results.get("config", {}), file, metric))
    return found


def check_cells(cells: Any, place: str) -> list[dict[str, Any]]:
    """The cells of a grid as they stand.

    Raises:
        UserError: they are not what scoring.grid makes.
    """
    found: list[dict[str, Any]] = files.check(cells, list[Cell], place)
    for i, cell in enumerate(found):
        if cell["scores"] and cell["primary"] not in cell["scores"]:
            raise UserError(f"{place}.{i}: has no score {cell['primary']!r}, which is its main one")
    return found


def _answers(file: Path) -> list[dict[str, Any]]:
    """The entries of a samples file, all with the same scores but for failures."""
    found: list[dict[str, Any]] = []
    names: set[str] = set()
    for number, sample in files.read_jsonl(file, Sample):
        answer = sample["cells"]
        if not answer["failed"]:
            names = names or set(answer["scores"])
            if set(answer["scores"]) != names or answer["primary"] not in names:
                raise UserError(
                    f"{file}, line {number}: cells.scores: has {sorted(answer['scores'])} with primary="
                    f"{answer['primary']!r}, the answers before it have {sorted(names)}"
                )
        found.append(answer)
    return found


def panel_of(task: str, cells: list[dict[str, Any]], config: dict[str, Any], file: Path, metric: str | None) -> Panel:
    """One panel from a grid's cells; config is that of lm-eval's results."""
    settings = config.get("kv_compression") or {}
    method = settings.get("method") or config.get("model") or "model"
    metric = metric or cells[0]["primary"]
    known = sorted({name for c in cells for name in c["scores"]})
    if known and metric not in known:
        raise UserError(f"{task} in {file} has no score {metric!r}; it has: {', '.join(known)}")
    return Panel(
        task=task,
        metric=metric,
        model=_model(config),
        method=str(method),
        label=_label(str(method), settings),
        settings=settings,
        cells=[{**c, "score": c["scores"].get(metric), "state": _state(c, settings)} for c in cells],
        results_file=file.name,
    )


def _state(cell: dict[str, Any], settings: dict[str, Any]) -> str:
    """scored, not compressed (all fits the budget), OOM (no answer at all), or a failure of another name.

    A method that also cuts while it answers must have room for prompt and answer.
    """
    if not cell["scores"]:
        return next(iter(cell["failed"]), "not run")
    tokens = cell["context_length"] if settings.get("compress_every") else cell["length_tokens"]
    budget = settings.get("max_capacity_prompt")
    fits = isinstance(budget, (int, float)) and tokens <= budget
    return "not compressed" if fits else "scored"


def _model(config: dict[str, Any]) -> str:
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    return Path(str(arguments.get("pretrained", config.get("model", "")))).name


def _label(method: str, settings: dict[str, Any]) -> str:
    """Method and budget, "snapkv, 64 pairs"."""
    if (pairs := settings.get("max_capacity_prompt")) is not None:
        return f"{method}, {pairs} pairs"
    if isinstance(share := settings.get("keep_ratio"), (int, float)):
        return f"{method}, {share:.0%} kept"
    return "full cache (hf)" if method == "hf" else "full cache" if method == "full" else method


# ---------------------------------------------------------------------------------------------- as data


def as_json(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """One object a panel; `scores` has a row a depth and a column a length."""
    return [
        {
            "task": p.task,
            "metric": p.metric,
            "model": p.model,
            "method": p.method,
            "label": p.label,
            "settings": p.settings,
            "results_file": p.results_file,
            "context_lengths": p.lengths,
            "document_depth_percents": p.depths,
            "scores": p.matrix(),
            "mean": p.mean,
            "floor": p.floor,
            "cells": p.cells,
        }
        for p in panels
    ]


COLUMNS = (
    "task metric model label context_length document_depth_percent score samples length_tokens state floor "
    "needle_depth_percent"
)


def write_csv(panels: Sequence[Panel], file: Path) -> None:
    """One row a cell."""
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(COLUMNS.split())
    for p in panels:
        for c in p.cells:
            row = {**c, "task": p.task, "metric": p.metric, "model": p.model, "label": p.label}
            table.writerow(["" if row.get(name) is None else row[name] for name in COLUMNS.split()])
    files.write_whole(file, out.getvalue())


def as_text(panel: Panel) -> str:
    """The grid for a terminal; a star marks what was not compressed."""
    rows = [["depth"] + [str(length) for length in panel.lengths]]
    for depth in panel.depths:
        cells = [panel.cell(depth, length) for length in panel.lengths]
        rows.append(["all" if depth is None else f"{depth:g} %", *map(_number, cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(v.rjust(w) for v, w in zip(r, widths, strict=True)) for r in rows)


def _number(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if cell["score"] is None:
        return str(cell["state"])
    return f"{cell['score']:.2f}" + ("*" if cell["state"] == "not compressed" else "")


# ---------------------------------------------------------------------------------------------- as pictures


def draw(panels: Sequence[Panel], title: str = "", colours: str = "classic", numbers: bool = True) -> Any:
    """A matplotlib Figure of the panels side by side on one scale.

    Args:
        panels: in the order to draw.
        title: over all; the task, score, model and samples where empty.
        colours: "classic" (red, yellow, green) or "viridis".
        numbers: write the scores into the cells (left out for grids of more than 15 columns).
    """
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    if colours not in COLOURS:
        raise ValueError(f"colours={colours!r} is not one of: {', '.join(COLOURS)}")
    cmap = colormaps["viridis"] if colours == "viridis" else LinearSegmentedColormap.from_list("needle", CLASSIC)
    columns = max(len(p.lengths) for p in panels)
    rows = max(len(p.depths) for p in panels)
    heads = [fit.wrap(_head(p), MAX_PANEL_INCHES, 9) for p in panels]
    head = max(fit.inches(text, 9) for text in heads)
    width = max(1.9, 0.55 * columns + 0.5, head + 0.25)
    per_row = max(1, min(len(panels), int((MAX_WIDTH_INCHES - 1) / width)))
    lines = -(-len(panels) // per_row)
    whole = per_row * width + 1.6
    over = fit.wrap(title or _title(panels), whole - 0.4, 11)
    height = max(1.5, 0.38 * rows + 0.4) + 0.5 + 0.17 * max(text.count("\n") + 1 for text in heads)
    figure = Figure(
        figsize=(whole, lines * height + 0.5 + 0.2 * (over.count("\n") + 1)), layout="constrained", facecolor=PAPER
    )
    axes = figure.subplots(lines, per_row, squeeze=False)
    image: Any = None
    for i, axis in enumerate(axes.flat):
        if i >= len(panels):
            axis.set_axis_off()
            continue
        image = _draw_panel(axis, panels[i], heads[i], cmap, Normalize(0, 1), numbers and columns <= 15)
        if i % per_row == 0:
            axis.set_ylabel("depth, % of the text", color=INK)
        if i + per_row >= len(panels):
            axis.set_xlabel("context length, tokens", color=INK)
    scale = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)
    scale.set_label(panels[0].metric, color=INK)
    scale.ax.tick_params(colors=INK)
    figure.suptitle(over, fontsize=11, color=INK)
    if any(c["state"] == "not compressed" for p in panels for c in p.cells):
        told = "hatched grey: the prompt fits the budget, nothing was compressed"
        figure.supxlabel(fit.wrap(told, whole - 0.4, 8), fontsize=8, color=INK)
    return figure


def _draw_panel(axis: Any, panel: Panel, head: str, cmap: Any, norm: Any, numbers: bool) -> Any:
    from matplotlib.patches import Rectangle

    values = [[math.nan if v is None else v for v in row] for row in panel.matrix()]
    image = axis.imshow(values, cmap=cmap, norm=norm, aspect="auto")
    for y, depth in enumerate(panel.depths):
        for x, length in enumerate(panel.lengths):
            cell = panel.cell(depth, length)
            state = cell["state"] if cell else "not run"
            if state != "scored":
                style: dict[str, Any] = (
                    {"hatch": "////", "facecolor": GREY} if state == "not compressed" else {"facecolor": DARK}
                )
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, edgecolor="white", linewidth=0, **style))
            text = "" if cell is None else _number(cell).rstrip("*")
            if numbers or (cell and cell["score"] is None):
                bright = state not in ("scored", "not compressed") or _is_dark(cmap, norm, cell, state)
                axis.text(x, y, text, ha="center", va="center", fontsize=8, color=WHITE if bright else BLACK)
    axis.set_xticks(range(len(panel.lengths)), [f"{n:,}" for n in panel.lengths], rotation=45, fontsize=8)
    axis.set_yticks(range(len(panel.depths)), ["all" if d is None else f"{d:g}" for d in panel.depths], fontsize=8)
    axis.set_xticks([x - 0.5 for x in range(1, len(panel.lengths))], minor=True)
    axis.set_yticks([y - 0.5 for y in range(1, len(panel.depths))], minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    axis.set_title(head, fontsize=9, color=INK)
    axis.tick_params(labelcolor=INK)
    for side in axis.spines.values():
        side.set_visible(False)
    return image


def _head(panel: Panel) -> str:
    return panel.label + (f"\nmean {panel.mean:.2f}" if panel.mean is not None else "")


def _is_dark(cmap: Any, norm: Any, cell: dict[str, Any] | None, state: str) -> bool:
    if cell is None or state == "not compressed":
        return False
    red, green, blue, _ = cmap(norm(cell["score"]))
    return bool(0.3 * red + 0.59 * green + 0.11 * blue < 0.45)


def _title(panels: Sequence[Panel]) -> str:
    first = panels[0]
    samples = sorted({c["samples"] + sum(c["failed"].values()) for p in panels for c in p.cells})
    count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    floors = [p.floor for p in panels if p.floor is not None]
    floor = f", without the needle {floors[0]:.2f}" if floors else ""
    noun = "sample" if count == "1" else "samples"
    return f"{first.task}, {first.metric}: {first.model}, {count} {noun} a cell{floor}"


def write(panels: Sequence[Panel], stem: Path, colours: str = "classic", title: str = "") -> list[Path]:
    """Writes STEM.png, .svg, .csv and .json; returns their paths."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg", "csv", "json")]
    figure = draw(panels, title, colours)
    files.write_whole(paths[0], _image(figure, "png", dpi=110, metadata={"Software": None}))
    files.write_whole(paths[1], _image(figure, "svg", metadata={"Date": None}))
    write_csv(panels, paths[2])
    files.write_json(paths[3], as_json(panels), indent=1)
    return paths


def _image(figure: Any, kind: str, **how: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format=kind, **how)
    return out.getvalue()

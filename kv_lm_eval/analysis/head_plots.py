"""Pictures of head statistics: entropy, sinks, where heads look, how the types separate, and distances."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kv_lm_eval.analysis.classifier import Thresholds
from kv_lm_eval.analysis.head_statistics import HeadStatistics
from kv_lm_eval.methods.head_profile import TYPES, Head

COLOURS = dict(zip(TYPES, ("#0072b2", "#999999", "#d55e00", "#000000"), strict=True))  # told apart by colour-blind eyes
SHORT = dict(zip(TYPES, ("pos.", "mixed", "gath.", "dead"), strict=True))
NEAR, SINKS = "positional: near", "positional: sinks"
MARKS = dict(zip(TYPES, "osDX", strict=True))
Layers = Sequence[Sequence[HeadStatistics]]
Types = Sequence[Sequence[Head]]


def write(stats: Layers, heads: Types, limits: Thresholds, folder: Path, title: str) -> list[Path]:
    """Writes the five pictures into a folder and returns their paths."""
    pictures = {
        "entropy_heatmap": _heatmap(stats, heads, "entropy", "mean attention entropy (nats)", "viridis", None, title),
        "sink_ratio": _heatmap(stats, heads, "sink", "share of attention on the first 4 tokens", "magma", 1.0, title),
        "position_preference": _preference(stats, title),
        "clustering": _clustering(stats, heads, limits, title),
        "relative_position": _distances(stats, heads, title),
    }
    paths = []
    for name, figure in pictures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
        plt.close(figure)
    return paths


def _heatmap(
    stats: Layers, heads: Types, name: str, label: str, colours: str, highest: float | None, title: str
) -> Any:
    """Layers down, heads across; small models get each head's number and type in its cell."""
    values = [[getattr(head, name) for head in layer] for layer in stats]
    rows, columns = len(values), len(values[0])
    figure, axes = plt.subplots(figsize=(min(14, 2.5 + 0.8 * columns), min(12, 1.6 + 0.6 * rows)))
    image = axes.imshow(values, cmap=colours, vmin=0, vmax=highest, aspect="auto")
    axes.set(xlabel="query head", ylabel="layer", title=title)
    _whole_ticks(axes, rows, columns)
    figure.colorbar(image, label=label)
    if rows * columns <= 64:
        top = highest or max(map(max, values)) or 1.0
        dark_low = colours in ("viridis", "magma")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                colour = "white" if (value < 0.6 * top) == dark_low else "black"
                text = f"{value:.2f}\n{SHORT[heads[y][x].type]}"
                axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


def _whole_ticks(axes: Any, rows: int, columns: int) -> None:
    axes.set_xticks(range(0, columns, max(1, columns // 16)))
    axes.set_yticks(range(0, rows, max(1, rows // 16)))


def _preference(stats: Layers, title: str) -> Any:
    """One stacked bar a head, or the mean of a layer where there are many heads."""
    single = sum(map(len, stats)) <= 64
    groups = [[head] for layer in stats for head in layer] if single else [list(layer) for layer in stats]
    names = [f"{h.layer}.{h.head}" for layer in stats for h in layer] if single else [str(i) for i in range(len(stats))]
    figure, axes = plt.subplots(figsize=(min(14, 3 + 0.3 * len(groups)), 4))
    shares = {
        "sink (first 4 tokens)": [_mean([h.sink for h in g]) for g in groups],
        "local (last 9 tokens)": [_mean([min(h.local, 1 - h.sink) for h in g]) for g in groups],
        "the rest": [_mean([h.far for h in g]) for g in groups],
    }
    bottom = [0.0] * len(groups)
    for (label, values), colour in zip(shares.items(), ("#d55e00", "#0072b2", "#cccccc"), strict=True):
        axes.bar(range(len(groups)), values, bottom=bottom, label=label, color=colour, width=0.85)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    axes.set_xticks(range(len(groups)), names, rotation=90 if len(groups) > 12 else 0)
    axes.set(xlabel="layer.head" if single else "layer", ylabel="share of attention", title=title, ylim=(0, 1))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=3, frameon=False)
    return figure


def _kinds(stats: Layers, heads: Types, limits: Thresholds) -> dict[str, list[HeadStatistics]]:
    """The heads of each type, positional ones by the rule that made them so."""
    kinds: dict[str, list[HeadStatistics]] = {kind: [] for kind in (NEAR, SINKS, *TYPES[1:])}
    for row, layer in zip(stats, heads, strict=True):
        for s, head in zip(row, layer, strict=True):
            kind = (NEAR if s.local > limits.high_local else SINKS) if head.type == "positional" else head.type
            kinds[kind].append(s)
    return kinds


def _clustering(stats: Layers, heads: Types, limits: Thresholds, title: str) -> Any:
    """Entropy against local attention; size is the share on sinks; dashed lines are the thresholds.

    A head under the entropy of positional ones is one by either of two rules, of which only the first can be seen as a
    line here; those of the second are hollow.
    """
    figure, axes = plt.subplots(figsize=(7.5, 5))
    for kind, chosen in _kinds(stats, heads, limits).items():
        if not chosen:
            continue
        colour = COLOURS[kind.split(":")[0]]
        axes.scatter(
            [s.entropy for s in chosen],
            [s.local for s in chosen],
            s=[25 + 250 * s.sink for s in chosen],
            c="none" if kind == SINKS else colour,
            marker=MARKS[kind.split(":")[0]],
            alpha=0.75,
            edgecolors=colour if kind == SINKS else "white",
            linewidths=1.2 if kind == SINKS else 0.8,
            label=f"{kind} ({len(chosen)})",
        )
    lines: dict[str, Any] = {"color": "black", "linewidth": 0.8, "linestyle": "--"}
    low, high, near = limits.low_entropy, limits.high_entropy, limits.high_local
    axes.set(xlabel="mean entropy (nats)", ylabel="share on the last 9 tokens", title=title, ylim=(-0.03, 1.06))
    left, right = min(0.0, axes.get_xlim()[0]), max(axes.get_xlim()[1], high + 0.6)
    axes.set_xlim(left, right)
    axes.plot([left, low], [near, near], **lines)
    for x in (low, high):
        axes.axvline(x, **lines)
    small: dict[str, Any] = {"fontsize": 7.5, "color": "0.25", "bbox": {"color": "white", "alpha": 0.6, "pad": 0.5}}
    at = left + 0.01 * (right - left)
    axes.text(at, 1.03, f"positional: entropy < {low:g},", ha="left", va="center", **small)
    axes.text(at, near + 0.015, f"near: this > {near:g}", ha="left", va="bottom", **small)
    axes.text(at, near - 0.02, f"sinks: share on them > {limits.high_sink:g}", ha="left", va="top", **small)
    axes.text(high + 0.04, 1.02, f"gathering: entropy > {high:g}", ha="left", va="center", **small)
    legend: Any = axes.legend(
        title="type (size: share on sinks)", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False
    )
    for handle in legend.legend_handles:
        handle.set_sizes([45])
    return figure


def _distances(stats: Layers, heads: Types, title: str) -> Any:
    """Mean attention by distance for each type, with the single heads behind it where a model has 64 or fewer."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    single = sum(map(len, stats)) <= 64
    for kind in TYPES:
        rows = [
            s.distances
            for row, layer in zip(stats, heads, strict=True)
            for s, h in zip(row, layer, strict=True)
            if h.type == kind
        ]
        if rows:
            for row in rows if single else []:
                axes.plot(row, color=COLOURS[kind], alpha=0.2, linewidth=0.8)
            mean = [_mean(column) for column in zip(*rows, strict=True)]
            axes.plot(mean, color=COLOURS[kind], linewidth=2, label=f"{kind}, mean of {len(rows)}")
    if single:
        axes.plot([], [], color="0.6", linewidth=0.8, label="thin: one head each")
    axes.set_yscale("log")
    axes.set(xlabel="distance back from the query (tokens)", ylabel="share of attention", title=title, ylim=(1e-4, 1.2))
    axes.legend()
    return figure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

"""Every point of a sweep of perplexities against one of them, on the same tokens: a table, a CSV file, a picture.

    python scripts/paired_table.py OUT --against "4 sinks" --csv sinks.csv --picture sinks.png

OUT is a sweep's folder with kv_ppl tasks. Scored are the tokens that every point scored after the earliest cut of any,
so that all rows are about the same tokens. An interval takes each text as one observation, of fewer than six texts
blocks of tokens (docs/perplexity.md). The table is markdown; the last line is one JSON document.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kv_lm_eval import console, files
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics import paired
from kv_lm_eval.metrics.perplexity import percent
from kv_lm_eval.stats import blocks

Point = dict[str, Any]  # its per-token records by text, what was kept, its scores


def main(argv: Sequence[str] | None = None) -> int:
    """Read, pair, write; returns the exit status."""
    return console.command("paired_table", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="paired_table.py", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--against", required=True, help="the name of a point")
    parser.add_argument("--rows", nargs="+", default=["*"], help="names of points, with * and ?; in this order")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--title", default="")
    args = parser.parse_args(argv)
    points = {name: point for folder in args.folder for name, point in read(folder).items()}
    if args.against not in points:
        raise UserError(f"--against {args.against!r} is no finished point; there are: {', '.join(points)}")
    names = [n for pattern in args.rows for n in points if fnmatch.fnmatchcase(n, pattern.replace("[", "[[]"))]
    table = rows({name: points[name] for name in dict.fromkeys([args.against, *names])}, args.against)
    if list(dict.fromkeys(names)) != list(dict.fromkeys([args.against, *names])):  # asked for in another order
        table = sorted(table, key=lambda row: list(dict.fromkeys([*names, args.against])).index(row["name"]))
    print(markdown(table, args.against))
    if args.csv:
        files.write_whole(args.csv, as_csv(table))
    if args.picture:
        draw(table, args.against, args.title, args.picture)
    print(json.dumps({"against": args.against, "rows": table}))
    return 0


def read(folder: Path) -> dict[str, Point]:
    """The finished points of a sweep, by name, in the order of its plan: per-token records and what was kept."""
    out: dict[str, Point] = {}
    records = {p["id"]: p for p in (files.read_json(f) for f in sorted(folder.glob("points/*/point.json")))}
    order = [p["id"] for p in files.read_json(folder / "plan.json")["points"]]
    for point in [records[i] for i in [*order, *(i for i in records if i not in order)] if i in records]:
        if point["status"] == "done":
            at = folder / "points" / point["id"]
            samples = next(at / file for file in point["files"] if Path(file).name.startswith("samples_"))
            results = files.read_json(at / point["results_file"])
            stats = results["config"]["kv_stats"]
            out[point["name"]] = {"records": paired.read(samples), "stats": stats, "results": results["results"]}
    return out


def rows(points: dict[str, Point], against: str) -> list[dict[str, Any]]:
    """One a point: over the tokens after the earliest cut of any of them.

    Raises:
        UserError: two points have not scored the same tokens.
    """
    nll = shared(points, against)
    out = []
    for name, values in nll.items():
        found = blocks.interval([v - w for v, w in zip(values, nll[against], strict=True)])
        mean = blocks.interval(values)["mean"]
        result = next(iter(points[name]["results"].values()))
        same = found["mean"] == 0 and all(
            np.array_equal(v, w, equal_nan=True) for v, w in zip(values, nll[against], strict=True)
        )
        bare = name == against or same
        out.append(
            {
                "name": name,
                "perplexity": float(np.exp(mean)),
                "accuracy": result.get("next_token_accuracy,none"),
                "change_percent": percent(found["mean"]),
                "low_percent": None if bare else percent(found["low"]),
                "high_percent": None if bare else percent(found["high"]),
                "kept": points[name]["stats"]["kept_fraction_mean"],
                "over": blocks.in_words(found),
                "tokens": int(sum(np.isfinite(v).sum() for v in values)),
                "bytes": points[name]["stats"]["kv_bytes_decode_mean"],
            }
        )
    return out


def shared(points: dict[str, Point], against: str) -> dict[str, list[np.ndarray]]:
    """Of each point the losses [tokens] of each text, NaN where a point has none or nothing was cut yet."""
    texts = points[against]["records"]
    for name, point in points.items():
        paired.differences(texts, point["records"])  # refuses other texts, models and protocols
        if lengths := [t for t in texts if len(texts[t]["nll"]) != len(point["records"][t]["nll"])]:
            raise UserError(
                f"{name} has scored another length of {lengths[0]} than {against}: one max_eval_tokens for all"
            )
    nll = {name: [_nll(point["records"][text]) for text in texts] for name, point in points.items()}
    for i, text in enumerate(texts):
        cuts = [p["records"][text]["first_eviction"] for p in points.values()]
        first = min((cut for cut in cuts if cut is not None), default=0)
        everywhere = np.all([np.isfinite(values[i]) for values in nll.values()], axis=0)
        everywhere[:first] = False
        for values in nll.values():
            values[i] = np.where(everywhere, values[i], np.nan)
    return nll


def _nll(record: Any) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in record["nll"]], dtype=np.float64)


def markdown(table: list[dict[str, Any]], against: str) -> str:
    """The table of a page."""
    lines = [f"| | perplexity | against {against} | |", "|---|---:|---:|---|"]
    for row in table:
        ends = ("", "") if row["name"] == against else (change(row), interval(row))
        lines.append(f"| {row['name']} | {row['perplexity']:.2f} | {ends[0]} | {ends[1]} |")
    return "\n".join(lines)


def change(row: dict[str, Any]) -> str:
    """In per cent."""
    return f"{row['change_percent']:+.2f} %"


def interval(row: dict[str, Any]) -> str:
    """In per cent; bold where zero lies outside."""
    if row["low_percent"] is None:
        return "the same, token by token" if row["change_percent"] == 0 else "no interval"
    words = f"{row['low_percent']:+.2f} to {row['high_percent']:+.2f}"
    return f"**{words}**" if row["low_percent"] > 0 or row["high_percent"] < 0 else words


def as_csv(table: list[dict[str, Any]]) -> str:
    """All numbers, full precision."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def draw(table: list[dict[str, Any]], against: str, title: str, path: Path) -> None:
    """A dot and its interval for each row, what is outside noise in colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.32 * len(table)))
    for place, row in enumerate(reversed(table)):
        mid, low, high = (row[k] for k in ("change_percent", "low_percent", "high_percent"))
        noise = low is None or low <= 0 <= high
        colour = "#888888" if noise else "#d55e00" if mid > 0 else "#0072b2"
        axes.plot([mid if low is None else low, mid if high is None else high], [place] * 2, color=colour, lw=2)
        axes.plot(mid, place, "o", color=colour)
    axes.set_yticks(range(len(table)), [row["name"] for row in reversed(table)])
    axes.axvline(0, color="black", lw=0.8)
    widest = max(abs(row["change_percent"]) for row in table)
    if widest > 30:
        axes.set_xscale("symlog", linthresh=3)
        ticks = [t for t in (-30, -10, -3, -1, 0, 1, 3, 10, 30, 100, 300, 1000) if abs(t) <= 1.3 * widest]
        axes.set_xticks(ticks, [f"{t:+d}" if t else "0" for t in ticks])
    axes.set(xlabel=f"perplexity against {against}, per cent", title=title)
    axes.grid(axis="x", lw=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)

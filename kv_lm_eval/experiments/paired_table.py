"""Every point of a sweep of perplexities against one of them, on the same tokens: a table, a CSV file, a picture.

    python scripts/paired_table.py OUT --against "4 sinks" --csv sinks.csv --picture sinks.png

OUT is a sweep's folder with kv_ppl tasks. Scored are the tokens that every point scored after the earliest cut of any,
so that all rows are about the same tokens; with --own-cut each row's after its own first cut, for caches of unlike
sizes. An interval takes each text as one observation, of fewer than six texts blocks of tokens (docs/perplexity.md). Of
points run with fidelity=True there is the KL of the same tokens besides, and --pareto draws it against the bytes held.
The table is markdown; the last line is one JSON document.
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

ROUNDING = 1e-9  # nats: less is two orders of adding in float32, whose square a divergence is
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
    parser.add_argument("--pareto", type=Path, help="a picture of KL against bytes, of points with fidelity=True")
    parser.add_argument("--own-cut", action="store_true", help="of each row the tokens after its own first cut")
    parser.add_argument("--title", default="")
    args = parser.parse_args(argv)
    points = {name: point for folder in args.folder for name, point in read(folder).items()}
    if args.against not in points:
        raise UserError(f"--against {args.against!r} is no finished point; there are: {', '.join(points)}")
    names = chosen(points, args.rows)
    wanted = {name: points[name] for name in dict.fromkeys([args.against, *names])}
    table = (by_own_cut if args.own_cut else rows)(wanted, args.against)
    if names != list(dict.fromkeys([args.against, *names])):  # asked for in another order
        table = sorted(table, key=lambda row: list(dict.fromkeys([*names, args.against])).index(row["name"]))
    print(markdown(table, args.against))
    if args.csv:
        files.write_whole(args.csv, as_csv(table))
    if args.picture:
        draw(table, args.against, args.title, args.picture)
    if args.pareto:
        draw_pareto(table, args.title, args.pareto)
    print(json.dumps({"against": args.against, "rows": table}))
    return 0


def chosen(points: dict[str, Point], patterns: Sequence[str]) -> list[str]:
    """Names of points that a pattern with * and ? matches, in the order of the patterns."""
    escaped = [pattern.replace("[", "[[]") for pattern in patterns]
    return list(dict.fromkeys(n for pattern in escaped for n in points if fnmatch.fnmatchcase(n, pattern)))


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
        kl, more = (_divergence(points[n]["records"], values) for n in (name, against))
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
                **_kl_of(kl, more),
            }
        )
    return out


def by_own_cut(points: dict[str, Point], against: str) -> list[dict[str, Any]]:
    """One a point: over the tokens after its own first cut, paired with the same ones of `against`.

    The row of `against` itself is over the tokens after the earliest cut.
    """
    of = points[against]
    own = {name: rows({against: of, name: point}, against)[-1] for name, point in points.items() if name != against}
    return [own.get(row["name"], row) for row in rows(points, against)]


def _divergence(records: dict[str, Any], nll: list[np.ndarray]) -> list[np.ndarray] | None:
    """KL to the full cache where `nll` is finite, [tokens] of each text; None without fidelity."""
    if any("kl" not in record for record in records.values()):
        return None
    of = [np.array([np.nan if v is None else v for v in r["kl"]], dtype=np.float64) for r in records.values()]
    return [np.where(np.isfinite(n), kl, np.nan) for kl, n in zip(of, nll, strict=True)]


def _kl_of(kl: list[np.ndarray] | None, other: list[np.ndarray] | None) -> dict[str, Any]:
    """Mean KL, and how much more it is than another point's, each with its interval."""
    names = ("kl", "kl_low", "kl_high", "kl_more", "kl_more_low", "kl_more_high")
    if kl is None:
        return dict.fromkeys(names)
    found = [blocks.interval(kl)]
    found += [blocks.interval([a - b for a, b in zip(kl, other, strict=True)])] if other is not None else []
    ends = [one[part] for one in found for part in ("mean", "low", "high")]
    return dict(zip(names, [*ends, None, None, None], strict=False))


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
    """The table of a page; with the KL where every point has one."""
    if all(row["kl"] is not None for row in table):
        return _markdown_with_kl(table, against)
    lines = [f"| | perplexity | against {against} | |", "|---|---:|---:|---|"]
    for row in table:
        ends = ("", "") if row["name"] == against else (change(row), interval(row))
        lines.append(f"| {row['name']} | {row['perplexity']:.2f} | {ends[0]} | {ends[1]} |")
    return "\n".join(lines)


def _markdown_with_kl(table: list[dict[str, Any]], against: str) -> str:
    most = max(row["bytes"] for row in table)
    lines = [f"| | bytes | KL | | against {against} | |", "|---|---:|---:|---|---:|---|"]
    for row in table:
        ends = ("", "") if row["name"] == against else (change(row), interval(row))
        kl = f"{row['kl']:.4f}", "" if row["kl_low"] is None else f"{row['kl_low']:.4f} to {row['kl_high']:.4f}"
        lines.append(f"| {row['name']} | {row['bytes'] / most:.1%} | {kl[0]} | {kl[1]} | {ends[0]} | {ends[1]} |")
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


def as_csv(table: Sequence[dict[str, Any]]) -> str:
    """All numbers, full precision."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def draw(table: list[dict[str, Any]], against: str, title: str, path: Path) -> None:
    """A dot and its interval for each row, what is outside noise in colour."""
    figure, axes = dots([(row["name"], *(row[f"{k}_percent"] for k in ("change", "low", "high"))) for row in table])
    widest = max(abs(row["change_percent"]) for row in table)
    if widest > 30:
        axes.set_xscale("symlog", linthresh=3)
        least = min((row["low_percent"] or row["change_percent"] for row in table), default=0.0)
        ticks = [t for t in (-30, -10, -3, -1, 0, 1, 3, 10, 30, 100, 300, 1000) if 1.3 * least - 1 <= t <= 1.3 * widest]
        axes.set_xticks(ticks, [f"{t:+d}" if t else "0" for t in ticks])
        axes.set_xlim(left=1.3 * min(least, 0) - 0.3)
    axes.set(xlabel=f"perplexity against {against}, per cent", title=title)
    axes.grid(axis="x", lw=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def dots(rows: Sequence[tuple[str, float, float | None, float | None]], less_is_better: bool = True) -> tuple[Any, Any]:
    """Figure and axes with a dot and its interval for each row (name, middle, low, high), the first on top; colour says
    that zero lies outside of the interval, orange that it is for the worse."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + 0.32 * len(rows)))
    axes = figure.subplots()
    for place, (_, mid, low, high) in enumerate(reversed(rows)):
        noise = low is None or high is None or low <= 0 <= high
        colour = "#888888" if noise else "#d55e00" if (mid > 0) == less_is_better else "#0072b2"
        axes.plot([mid if low is None else low, mid if high is None else high], [place] * 2, color=colour, lw=2)
        axes.plot(mid, place, "o", color=colour)
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    axes.axvline(0, color="black", lw=0.8)
    return figure, axes


def draw_pareto(table: list[dict[str, Any]], title: str, path: Path) -> None:
    """KL against bytes, of the points that differ from the full cache; a line joins those that nothing betters, dotted
    ones each method's budgets.

    Raises:
        UserError: a point was run without fidelity=True.
    """
    if without := [row["name"] for row in table if row["kl"] is None]:
        raise UserError(f"--pareto needs KL, and {without[0]} has none: run it with fidelity=True")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most = max(row["bytes"] for row in table)
    dots = dots_of(table)
    figure, axes = plt.subplots(figsize=(8, min(9, 4 + 0.25 * len(dots))))
    axes.set(xscale="log", yscale="log", xlabel="bytes held, per cent of the full cache", ylabel="KL, nats a token")
    for row in table:
        if row["kl"] > ROUNDING and row["kl_low"] is not None:
            ends = [max(row["kl_low"], row["kl"] / 10), row["kl_high"]]
            axes.plot([100 * row["bytes"] / most] * 2, ends, color="#cccccc", lw=1)
    front = [dot for at, dot in enumerate(dots) if dot[1] < min((kl for _, kl, _ in dots[:at]), default=np.inf)]
    axes.plot([dot[0] for dot in front], [dot[1] for dot in front], color="#0072b2", lw=1)
    for line in budgets_of([name for *_, name in dots]).values():
        axes.plot(*zip(*(dot[:2] for dot in dots if dot[2] in line), strict=True), ":", color="#888888", lw=1)
    for dot in dots:
        axes.plot(*dot[:2], "o", color="#0072b2" if dot in front else "#888888")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.3)  # room for names
    ticks = [t for t in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t} %" for t in ticks])
    axes.xaxis.minorticks_off()
    _names(axes, dots)
    axes.set_title(title)
    axes.grid(lw=0.3, which="both")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def dots_of(table: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
    """Per cent of the most bytes, KL and name of each row whose KL is more than rounding, which the full cache has."""
    most = max(row["bytes"] for row in table)
    return sorted((100 * row["bytes"] / most, row["kl"], row["name"]) for row in table if row["kl"] > ROUNDING)


def budgets_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The points of one method at several budgets, by what their names share: all before the last comma."""
    found: dict[str, list[str]] = {}
    for name in names:
        if stem := name.rpartition(", ")[0]:
            found.setdefault(stem, []).append(name)
    return {stem: of_stem for stem, of_stem in found.items() if len(of_stem) > 1}


def _names(axes: Any, dots: list[tuple[float, float, str]]) -> None:
    """The name of each dot to its right, at the nearest height where no other name or dot is."""
    line = 9 * axes.figure.dpi / 72  # pixels
    at = {name: axes.transData.transform((share, kl)) for share, kl, name in dots}
    taken = [(x - 4, x + 4, y) for x, y in at.values()]  # left, right and height
    heights = [step * line for n in range(len(dots) + 1) for step in (n, -n)]
    for share, kl, name in sorted(dots, key=lambda dot: dot[1]):
        left, y = at[name][0] + 20, at[name][1]
        right = left + 0.45 * line * len(name)
        free = (
            y + h for h in heights if not any(left < r and x < right and abs(o - y - h) < line for x, r, o in taken)
        )
        height = next(free, y)
        taken.append((left, right, height))
        away = {"arrowstyle": "-", "color": "#999999", "lw": 0.5, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            name, (share, kl), (20, height - y), textcoords="offset pixels", fontsize=7, va="center", arrowprops=away
        )

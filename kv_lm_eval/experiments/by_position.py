"""Perplexity of each point of a sweep by place in the text, in stretches: a table, a CSV file, a picture.

    python scripts/perplexity_by_position.py OUT --edges 0 4096 8192 16384 --csv past.csv --picture past.png

OUT is a sweep's folder with kv_ppl tasks. All tokens of a text count, those before a first cut too; every text has to
reach into every stretch, so that all stretches are about the same texts. With --against, of each stretch there is the
difference to that point as well, paired token by token: an interval takes each text as one observation, of fewer than
six texts blocks of tokens. The table is markdown; the last line is one JSON document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kv_lm_eval import console, files
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments.paired_table import Point, as_csv, chosen, read
from kv_lm_eval.metrics import paired
from kv_lm_eval.metrics.perplexity import percent
from kv_lm_eval.stats import blocks

SMOOTHED = 500  # tokens that a point of the picture's lines is the mean of


def main(argv: Sequence[str] | None = None) -> int:
    """Read, average, write; returns the exit status."""
    return console.command("perplexity_by_position", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="perplexity_by_position.py", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--edges", type=int, nargs="+", required=True, help="places in tokens where stretches meet")
    parser.add_argument("--against", help="the name of a point")
    parser.add_argument("--rows", nargs="+", default=["*"], help="names of points, with * and ?; in this order")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--title", default="")
    args = parser.parse_args(argv)
    points = {name: point for folder in args.folder for name, point in read(folder).items()}
    if args.against is not None and args.against not in points:
        raise UserError(f"--against {args.against!r} is no finished point; there are: {', '.join(points)}")
    wanted = {name: points[name] for name in chosen(points, args.rows)}
    if not wanted:
        raise UserError(
            f"--rows {' '.join(args.rows)}: no finished point has such a name; there are: {', '.join(points)}"
        )
    table = rows(wanted, args.edges, points[args.against] if args.against else None)
    print(markdown(table))
    if args.csv:
        files.write_whole(args.csv, as_csv(table))
    if args.picture:
        draw(wanted, args.edges, args.title, args.picture)
    print(json.dumps({"against": args.against, "rows": table}))
    return 0


def rows(points: dict[str, Point], edges: Sequence[int], against: Point | None = None) -> list[dict[str, Any]]:
    """One a point and stretch: name, from, to (tokens), perplexity, tokens; change_percent and its ends with `against`.

    Raises:
        UserError: edges do not rise, a text has no scored token in a stretch, or two points have scored other tokens.
    """
    if len(edges) < 2 or any(a >= b for a, b in pairwise(edges)) or edges[0] < 0:
        raise UserError(f"--edges {' '.join(map(str, edges))}: two places or more, each later than the one before")
    texts = list((against or next(iter(points.values())))["records"])
    theirs = None if against is None else losses(against, texts)
    out = []
    for name, point in points.items():
        if against is not None:
            paired.differences(against["records"], point["records"])  # refuses other texts, models and protocols
        nll = losses(point, texts)
        for begin, end in pairwise(edges):
            part = [v[begin:end] for v in nll]
            for text, values, whole in zip(texts, part, nll, strict=True):
                if not np.isfinite(values).any():
                    raise UserError(
                        f"--edges: {name} has no scored token of {text} from {begin} to {end}; of its {len(whole)} "
                        f"tokens {int(np.isfinite(whole).sum())} were scored"
                    )
            found = {"name": name, "from": begin, "to": end, "tokens": int(sum(np.isfinite(v).sum() for v in part))}
            found["perplexity"] = float(np.exp(blocks.interval(part)["mean"]))
            if theirs is not None:
                found.update(_apart(part, [v[begin:end] for v in theirs], name, bare=point is against))
            out.append(found)
    return out


def _apart(ours: list[np.ndarray], theirs: list[np.ndarray], name: str, bare: bool) -> dict[str, float | None]:
    """Of one stretch: the difference in per cent and its interval, none of a point beside itself."""
    if any(len(a) != len(b) or not np.isfinite(a - b).any() for a, b in zip(ours, theirs, strict=True)):
        raise UserError(
            f"{name} and --against have not scored the same tokens of every text: one max_eval_tokens and one "
            "protocol for all"
        )
    found = blocks.interval([a - b for a, b in zip(ours, theirs, strict=True)])
    low, high = (None if bare or found[end] is None else percent(found[end]) for end in ("low", "high"))
    return {"change_percent": percent(found["mean"]), "low_percent": low, "high_percent": high}


def losses(point: Point, texts: Sequence[str]) -> list[np.ndarray]:
    """Nats of each token [tokens] of each of the texts; NaN: not scored.

    Raises:
        UserError: the point has not scored one of them.
    """
    if missing := [text for text in texts if text not in point["records"]]:
        raise UserError(f"not every point has scored {missing[0]}: one list of texts for all")
    each = (point["records"][text]["nll"] for text in texts)
    return [np.array([np.nan if v is None else v for v in nll], np.float64) for nll in each]


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """Perplexity, a line a point and a column a stretch."""
    stretches = list(dict.fromkeys((row["from"], row["to"]) for row in table))
    lines = ["| tokens | " + " | ".join(f"{a:,} to {b:,}" for a, b in stretches) + " |"]
    lines.append("|---" + "|---:" * len(stretches) + "|")
    for name in dict.fromkeys(row["name"] for row in table):
        own = [f"{row['perplexity']:,.1f}" for row in table if row["name"] == name]
        lines.append(f"| {name} | " + " | ".join(own) + " |")
    return "\n".join(lines)


def draw(points: dict[str, Point], edges: Sequence[int], title: str, path: Path) -> None:
    """Perplexity against place, the mean of so many tokens around it, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5))
    for name, point in points.items():
        longest = max(map(len, own := losses(point, list(point["records"]))))
        padded = np.full((len(own), longest), np.nan)
        for line, values in zip(padded, own, strict=True):
            line[: len(values)] = values
        begin, end = edges[0], min(edges[-1], longest)
        size = min(SMOOTHED, end - begin)
        places = range(begin, end - size + 1, max(1, size // 5))
        axes.plot(
            [at + size / 2 for at in places],
            [float(np.exp(np.nanmean(padded[:, at : at + size]))) for at in places],
            label=name,
            lw=1.2,
        )
    axes.set(yscale="log", xlabel="token of the text", ylabel=f"perplexity of {SMOOTHED} tokens", title=title)
    axes.grid(which="both", lw=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)

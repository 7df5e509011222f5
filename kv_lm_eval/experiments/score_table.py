"""Every point of one or more sweeps against one of them by score, prompt by prompt: a table, a CSV file, a picture.

    python scripts/score_table.py OUT/* --against "full cache" --csv longbench.csv --picture longbench.png

OUT/* are the folders of sweeps with the same points, one a dataset, say; a point is known by its name. A score is that
of its task in --metric, in points of a hundred; `mean` weighs the tasks alike, whatever their numbers of prompts. The
difference is over the prompts that both points were asked, with a 95 % interval in which each task's prompts are a
stratum. Scores below 0 or above 1 are refused. The table is markdown; the last line is one JSON document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kv_lm_eval import console, files
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments.compare import SAMPLES
from kv_lm_eval.experiments.paired_table import as_csv, chosen, dots
from kv_lm_eval.stats import paired
from kv_lm_eval.stats.paired import AGGREGATIONS, Pair

PERCENT = next(a for a in AGGREGATIONS if a.name == "percent")
Scores = dict[str, dict[tuple[str, str], float]]  # by task: of each prompt (document and hash), 0 to 1


def main(argv: Sequence[str] | None = None) -> int:
    """Read, compare, write; returns the exit status."""
    return console.command("score_table", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="score_table.py", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--against", required=True, help="the name of a point")
    parser.add_argument("--metric", default="score", help="of each prompt, in the samples file (default: score)")
    parser.add_argument(
        "--rows", nargs="+", default=["*"], help="names of points, with * and ?; default all, best first"
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--title", default="")
    args = parser.parse_args(argv)
    points = read(args.folder, args.metric)
    if args.against not in points:
        raise UserError(f"--against {args.against!r} is no finished point; there are: {', '.join(points)}")
    table = rows(points, args.against, chosen(points, args.rows))
    if args.rows == ["*"]:
        table.sort(key=lambda row: -row["mean"])
    print(markdown(table, args.against))
    if args.csv:
        files.write_whole(args.csv, as_csv(table))
    if args.picture:
        draw(table, args.against, args.title, args.picture)
    print(json.dumps({"against": args.against, "rows": table}))
    return 0


def read(folders: Sequence[Path], metric: str) -> dict[str, Scores]:
    """The finished points of all sweeps, by name.

    Raises:
        UserError: a folder is no sweep's, no prompt has the metric, or a score is not in 0 to 1.
    """
    out: dict[str, Scores] = {}
    for folder in folders:
        if not (folder / "plan.json").is_file():
            raise UserError(f"{folder} is no sweep's folder: it has no plan.json")
        for place in sorted(folder.glob("points/*/point.json")):
            point = files.read_json(place)
            for file in point.get("files", []) if point["status"] == "done" else []:
                if samples := SAMPLES.fullmatch(Path(file).name):
                    of_task = out.setdefault(point["name"], {}).setdefault(samples["task"], {})
                    of_task.update(_scores(place.parent / file, metric))
    if not out:
        raise UserError("no finished point in " + ", ".join(map(str, folders)))
    return out


def _scores(file: Path, metric: str) -> dict[tuple[str, str], float]:
    found = {}
    for _, sample in files.read_jsonl(file):
        if metric not in sample:
            raise UserError(f"{file} has no {metric!r} for its prompts; --metric names one of: {sample.get('metrics')}")
        if not 0 <= sample[metric] <= 1:
            raise UserError(f"{file}: {metric} = {sample[metric]} of prompt {sample['doc_id']} is no share of one")
        found[str(sample["doc_id"]), str(sample["prompt_hash"])] = float(sample[metric])
    return found


def rows(points: Mapping[str, Scores], against: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """One a point: scores by task and their mean, the difference to `against` with its interval, in points.

    Raises:
        UserError: a point lacks a task of `against`, or they have no prompt of it in common.
    """
    base = points[against]
    out = []
    for name in names:
        pairs = []
        for task, theirs in base.items():
            ours = points[name].get(task, {})
            if not (common := [key for key in theirs if key in ours]):
                raise UserError(f"{name} and {against} have no prompt of {task} in common")
            pairs.append(Pair(_table(ours, common), _table(theirs, common), PERCENT))
        scores = {task: PERCENT.value(pair.ours) for task, pair in zip(base, pairs, strict=True)}
        found = paired.compare(pairs, [1 / len(pairs)] * len(pairs))
        bare = name == against
        out.append(
            {
                "name": name,
                **scores,
                "mean": float(np.mean(list(scores.values()))),
                "difference": None if bare else found.difference,
                "low": None if bare else found.low,
                "high": None if bare else found.high,
                "p": None if bare else found.p,
                "prompts": found.documents,
                "changed": found.changed,
            }
        )
    return out


def _table(scores: Mapping[tuple[str, str], float], keys: Sequence[tuple[str, str]]) -> Any:
    return np.array([[scores[key], 1.0] for key in keys])


def markdown(table: Sequence[dict[str, Any]], against: str) -> str:
    """The table of a page; bold where zero lies outside of the interval."""
    tasks = [key for key in list(table[0])[1:] if key not in COLUMNS]
    lines = [
        f"| | {' | '.join(tasks)} | mean | against {against} | 95 % |",
        "|---" + "|---:" * (len(tasks) + 2) + "|---|",
    ]
    for row in table:
        own = " | ".join(f"{row[key]:.1f}" for key in [*tasks, "mean"])
        lines.append(f"| {row['name']} | {own} | {_difference(row)} |")
    return "\n".join(lines)


COLUMNS = ("mean", "difference", "low", "high", "p", "prompts", "changed")


def _difference(row: Mapping[str, Any]) -> str:
    if row["difference"] is None:
        return " | "
    if not row["changed"]:
        return "0 | the same, prompt by prompt"
    words = "no interval" if row["low"] is None else f"{row['low']:+.1f} to {row['high']:+.1f}"
    told = row["low"] is not None and (row["low"] > 0 or row["high"] < 0)
    return f"{row['difference']:+.1f} | " + (f"**{words}**" if told else words)


def draw(table: Sequence[dict[str, Any]], against: str, title: str, path: Path) -> None:
    """A dot and its interval for each row, what is outside noise in colour."""
    figure, axes = dots(
        [(row["name"], row["difference"] or 0.0, row["low"], row["high"]) for row in table], less_is_better=False
    )
    axes.set(xlabel=f"points against {against}, mean of the tasks", title=title)
    axes.grid(axis="x", lw=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")

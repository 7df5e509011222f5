"""Draws needle heat-maps from lm-eval results, after a stock `lm_eval` run or to compare runs of several folders.

    python scripts/needle_heatmap.py RESULTS... [--output STEM] [--metric NAME] [--colours viridis] [--title TEXT]

RESULTS are results_*.json or samples_*.jsonl files of kv_needle tasks, or folders that hold results. All runs of a task
go side by side into one picture, full caches first. Writes STEM_<task>.png, .svg, .csv and .json; the last line printed
is a JSON document with the files and the mean of each panel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kv_lm_eval import console, files
from kv_lm_eval.errors import UserError
from kv_lm_eval.tasks.needle import heatmap


def main(argv: Sequence[str] | None = None) -> int:
    """Read, group by task, draw; returns the exit status."""
    return console.command("needle_heatmap", lambda: _main(argv), lambda: "The same command draws all of it again.")


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="needle_heatmap.py", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("heatmap"), help="path of the pictures, without ending")
    parser.add_argument("--metric", help="a score's name; default: the main one of each task")
    parser.add_argument("--colours", choices=heatmap.COLOURS, default="classic")
    parser.add_argument("--title", default="")
    args = parser.parse_args(argv)
    files.check_folder(args.output.parent, "the folder of --output")
    left_out: list[str] = []
    try:
        panels = heatmap.read(args.results, args.metric, left_out)
    except UserError as error:
        parser.error(str(error))
    for text in left_out:
        print(f"left out: {text}", file=sys.stderr)
    written = {}
    for task in dict.fromkeys(panel.task for panel in panels):
        of_task = [panel for panel in panels if panel.task == task]
        stem = args.output.with_name(f"{args.output.name}_{task}")
        drawn = heatmap.write(of_task, stem, args.colours, args.title)
        written[task] = {"files": list(map(str, drawn)), "means": {p.label: p.mean for p in of_task}}
    print(json.dumps(written))
    return 0

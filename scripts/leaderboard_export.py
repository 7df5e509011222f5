"""Writes kvpress's files (config.yaml, metrics.json, predictions.csv) of a RULER run, to hand in to its leaderboard.

    python scripts/leaderboard_export.py out/MODEL/results_DATE.json --out FOLDER

`kv-lm-eval run` with protocol=kvpress, --output_path and --log_samples does the same by itself (docs/leaderboard.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kv_lm_eval import console
from kv_lm_eval.tasks.needle.ruler import export


def main(argv: Sequence[str] | None = None) -> int:
    return console.command(
        "leaderboard_export", lambda: _main(argv), lambda: "The same command writes all of it again."
    )


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="leaderboard_export.py", description=__doc__)
    parser.add_argument("results", type=Path, help="lm-eval's results_*.json, its samples beside it")
    parser.add_argument("--out", type=Path, required=True, help="a folder; each length gets one below it")
    args = parser.parse_args(argv)
    for folder in export.write(args.results, args.out):
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

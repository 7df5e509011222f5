"""Tables, pictures and one HTML page from any folder of lm-eval results, or from a sweep.

    kv-lm-eval report DIR [--output_path OUT] [--metrics acc_norm,f1]

DIR holds results of runs with --output_path (and --log_samples, for intervals and answers), at any depth; runs of the
same model are compared with its full cache (method=full, or --model hf). Writes OUT/report.html, OUT/tables/ (markdown,
CSV, LaTeX) and OUT/plots/ (PNG, SVG, CSV); OUT is DIR/report unless it is given. Prints the scores and the differences;
the last line is a JSON document with the files and the numbers.

A file that is damaged is named on the page and on stderr and left out. Exit status: 0 the report is written, 2 nothing
could be read or the report could not be written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kv_lm_eval import console, files


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, writes, prints; returns the exit status."""
    return console.command("report", lambda: _report(argv), lambda: "The same command writes all of it.")


def _report(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="kv-lm-eval report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of results, or of a sweep")
    parser.add_argument("--output_path", type=Path, help="where to write (default: DIR/report)")
    parser.add_argument("--metrics", default="", help="scores to show, by comma, in place of each task's main one")
    parser.add_argument("--title", default="", help="of the page")
    args = parser.parse_args(argv)
    from kv_lm_eval.reporting import build, tables
    from kv_lm_eval.reporting.table import as_markdown

    out = args.output_path or args.folder / "report"
    metrics = [name for name in args.metrics.split(",") if name]
    files.check_is_folder(args.folder)
    files.check_folder(out, "--output_path")
    written = build.write(args.folder, out, args.title, metrics)
    report = written.report
    shown = [tables.scores(report), tables.differences(report)]
    print("\n".join(as_markdown(table) for table in shown))
    for text in report.damaged:
        print(f"left out: {text}", file=sys.stderr)
    for note in report.notes:
        print(f"note: {note}")
    print(f"\npage: {written.page}")
    numbers = {row.label: {c.task: row.cells[c].value for c in report.columns} for row in report.rows}
    about = {"page": str(written.page), "files": list(map(str, written.files))}
    print(json.dumps({**about, "scores": numbers, "damaged": report.damaged}))
    return 0

"""Everything of a report into a folder: tables/, plots/ and report.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kv_lm_eval.reporting import html, load, plots, rows, tables


@dataclass(frozen=True)
class Written:
    """What was written, and the report itself."""

    page: Path
    files: list[Path]
    report: rows.Report


def write(folder: Path, out: Path, title: str = "", metrics: Sequence[str] = ()) -> Written:
    """Reads the results below a folder and writes the report.

    Args:
        folder: of results, or of a sweep.
        out: made if it is not there; files of an earlier report are replaced.
        title: of the page; the sweep's name or the folder's where empty.
        metrics: scores to show in place of a task's main one.

    Returns:
        The paths written and the numbers.

    Raises:
        UserError: nothing to report on, or a score that no task has.
    """
    runs, notes = load.read(folder)
    report = rows.report(runs, notes, metrics)
    shown = [tables.scores(report), tables.differences(report), tables.speed(report)]
    written: list[Path] = []
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for table in shown:
        comma = tables.scores_csv(report) if table.name == "scores" else tables.as_csv(table)
        for ending, text in (("md", tables.as_markdown(table)), ("csv", comma), ("tex", tables.as_latex(table))):
            written.append(_write(out / "tables" / f"{table.name}.{ending}", text))
    written.append(_write(out / "tables" / "all_numbers.csv", tables.as_csv(tables.every_number(report))))
    panels = plots.needle_panels(report)
    pictures = plots.all_of(report, panels)
    for picture in pictures:
        written += plots.write(picture, out / "plots")
    title = title or f"KV-cache compression: {_name(folder)}"
    page = _write(out / "report.html", html.page(report, shown, pictures, out / "plots", title))
    return Written(page, [page, *written], report)


def _write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8", errors="replace")  # answers may hold half a surrogate pair
    return file


def _name(folder: Path) -> str:
    plan = folder / "plan.json"
    if plan.is_file():
        found = json.loads(plan.read_text(encoding="utf-8"))
        return str(found.get("name") or folder.resolve().name)
    return folder.resolve().name

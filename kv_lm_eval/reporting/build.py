"""Everything of a report into a folder: tables/, plots/ and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kv_lm_eval import files
from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import fidelity, load, page, plots, rows, tables
from kv_lm_eval.reporting.cells import Report
from kv_lm_eval.reporting.table import as_csv, as_latex, as_markdown


@dataclass(frozen=True)
class Written:
    """What was written, and the report itself."""

    page: Path
    files: list[Path]
    report: Report


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
        UserError: nothing to report on, a score that no task has, or a file that could not be written.
    """
    runs, said = load.read(folder)
    report = rows.report(runs, said, metrics)
    files.check_folder(out, "--output_path")
    shown = [tables.scores(report), tables.differences(report), tables.speed(report)]
    if (compared := fidelity.table(report)) is not None:
        shown.insert(2, compared)
    if progress := tables.progress(report):  # first where it matters, else last
        shown = [*shown, progress] if all(sweep.is_done for sweep in said.sweeps) else [progress, *shown]
    written: list[Path] = []
    for table in shown:
        for ending, text in (("md", as_markdown(table)), ("csv", as_csv(table)), ("tex", as_latex(table))):
            written.append(_write(out / "tables" / f"{table.name}.{ending}", text))
    written.append(_write(out / "tables" / "all_numbers.csv", as_csv(tables.every_number(report))))
    panels = plots.needles.panels_of(report)
    pictures = plots.all_of(report, panels)
    for picture in pictures:
        written += plots.write(picture, out / "plots")
    title = title or f"KV-cache compression: {load.name_of(folder, said)}"
    html = _write(out / "report.html", page.page(report, shown, pictures, out / "plots", title))
    return Written(html, [html, *written], report)


def _write(file: Path, text: str) -> Path:
    """Whole, and read back: what a report says it wrote is there."""
    files.write_whole(file, text)
    if file.read_bytes() != text.encode(errors="replace"):
        raise UserError(f"{file}: reads back other than it was written; is the disk in order?")
    return file

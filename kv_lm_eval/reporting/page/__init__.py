"""One HTML page with everything of a report: opens from disk, needs no network, and escapes every text it is given.

It is read without scripts too, but for the answers; scripts sort, filter, copy and save. A file each: grids.py (the
tables), figures.py, samples.py (answers), tokens.py, runs.py (what was run), and the script of the same name beside it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from kv_lm_eval.reporting.cells import Report
from kv_lm_eval.reporting.page import figures, grids, runs, samples, tokens
from kv_lm_eval.reporting.plots.drawing import Picture
from kv_lm_eval.reporting.table import LATEX, Table

MAX_NOTES = 12
SCRIPTS = ("common", "grids", "copying", "figures", "samples", "tokens")  # in this order


def page(report: Report, tables: Sequence[Table], pictures: Sequence[Picture], folder: Path, title: str) -> str:
    """The page.

    Args:
        report: the numbers, for what was run and the answers.
        tables: shown in this order.
        pictures: whose NAME.svg are in `folder`.
        folder: where the pictures were written.
        title: at the top.
    """
    answers, said = samples.samples(report)
    views = tokens.views(report)
    sections = [
        ("damaged", "Files left out", _damaged(report.damaged)),
        ("runs", "What was run", runs.section(report)),
        ("notes", "Read this first", _notes(report.notes)),
        *((table.name, table.title, grids.section(table)) for table in tables),
        ("pictures", "Pictures", "\n".join(figures.section(p, folder) for p in pictures)),
        ("tokens", "Token by token", tokens.section(views)),
        ("samples", "Answers side by side", samples.section(answers, said)),
    ]
    shown = [(anchor, head, text) for anchor, head, text in sections if text]
    body = "\n".join(f'<section id="{a}"><h2>{escape(h)}</h2>\n{text}\n</section>' for a, h, text in shown)
    return Template(_resource("page.html")).substitute(
        title=escape(title),
        what=escape(_what(report)),
        nav=" ".join(f'<a href="#{a}">{escape(h)}</a>' for a, h, _ in shown),
        css=style(),
        js="\n".join(_resource(f"{name}.js") for name in SCRIPTS),
        body=body,
        latex=_script_json(LATEX),
        answers=_script_json(answers),
        views=_script_json(views),
    )


def style() -> str:
    """The style of this page and of its kin."""
    return _resource("style.css")


def _resource(name: str) -> str:
    return files("kv_lm_eval.reporting.page").joinpath(name).read_text(encoding="utf-8")


def _script_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _what(report: Report) -> str:
    tasks = list(dict.fromkeys(c.task for c in report.columns if not c.leaves))
    dates = sorted(run.date for row in report.rows for run in row.runs if run.date)
    when = ""
    if dates:
        first, last = (time.strftime("%Y-%m-%d", time.gmtime(d)) for d in (dates[0], dates[-1]))
        when = f", run on {first}" if first == last else f", run from {first} to {last}"
    named = ", ".join(tasks[:4]) + (f" and {len(tasks) - 4} more" if len(tasks) > 4 else "")
    return f"{', '.join(report.models)}: {len(report.rows)} methods and settings on {named}{when}."


def _damaged(damaged: Sequence[str]) -> str:
    """Every one of them, open: a number that is not there must not look like one that never was."""
    if not damaged:
        return ""
    count = "1 file" if len(damaged) == 1 else f"{len(damaged)} files"
    listed = "".join(f"<li>{escape(text)}</li>" for text in damaged)
    return (
        f'<div class="damaged"><p>{count} could not be read or cannot be believed. Nothing on this page comes from '
        f"them.</p><ul>{listed}</ul></div>"
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""

    def as_list(texts: Sequence[str]) -> str:
        return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"

    more = ""
    if len(notes) > MAX_NOTES:
        more = f"<details><summary>{len(notes) - MAX_NOTES} more</summary>{as_list(notes[MAX_NOTES:])}</details>"
    return f'<div class="notes">{as_list(notes[:MAX_NOTES])}{more}</div>'

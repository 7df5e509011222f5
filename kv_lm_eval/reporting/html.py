"""One HTML page with everything of a report: opens from disk, needs no network, and escapes every text it is given."""

from __future__ import annotations

import base64
import json
import platform
import re
import time
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from kv_lm_eval import __version__
from kv_lm_eval.reporting import per_token, rerun
from kv_lm_eval.reporting.answers import Sample, SampleKey
from kv_lm_eval.reporting.cells import Column, Report, Row
from kv_lm_eval.reporting.plots.drawing import Picture
from kv_lm_eval.reporting.run import is_number
from kv_lm_eval.reporting.table import Table, Value
from kv_lm_eval.stats import paired

MAX_DOCUMENTS = 40  # a task, in the page
MAX_SAMPLE_BYTES = 3_000_000  # of all tasks together
MAX_NOTES = 12


def page(report: Report, tables: Sequence[Table], pictures: Sequence[Picture], folder: Path, title: str) -> str:
    """The page.

    Args:
        report: the numbers, for what was run and the answers.
        tables: shown in this order.
        pictures: whose NAME.png are in `folder`.
        folder: where the pictures were written.
        title: at the top.
    """
    data, said = samples(report)
    sections = [
        ("damaged", "Files left out", _damaged(report.damaged)),
        ("notes", "Read this first", _notes(report.notes)),
        *((table.name, table.title, _table(table)) for table in tables),
        ("pictures", "Pictures", "\n".join(_picture(p, folder) for p in pictures)),
        ("tokens", "Token by token", per_token.section(data["views"])),
        ("samples", "Answers side by side", _samples(data, said)),
        ("runs", "What was run", _runs(report)),
    ]
    shown = [(anchor, head, text) for anchor, head, text in sections if text]
    body = "\n".join(f'<section id="{a}"><h2>{escape(h)}</h2>\n{text}\n</section>' for a, h, text in shown)
    resources = files("kv_lm_eval.reporting")
    return Template(resources.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        what=escape(_what(report)),
        nav=" ".join(f'<a href="#{a}">{escape(h)}</a>' for a, h, _ in shown),
        css=resources.joinpath("page.css").read_text(encoding="utf-8"),
        js=resources.joinpath("page.js").read_text(encoding="utf-8"),
        body=body,
        data=_script_json(data),
    )


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


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"><button type="button" title="sort">{escape(name)}</button>'
        + (f"<small>{escape(unit)}</small>" if unit else "")
        + "</th>"
        for name, unit in table.head
    )
    rows = []
    for row in table.rows:
        cells = []
        for i, value in enumerate(row):
            text = _breakable(value.text) if i == 0 else _on_two_lines(value)
            number = "" if value.number is None else repr(value.number)
            title = f' title="{escape(value.title)}"' if value.title else ""
            cells.append(f'<td class="{escape(value.tone)}" data-v="{number}"{title}>{text}</td>')
        rows.append("<tr>" + "".join(cells) + "</tr>")
    below = "".join(f'<p class="legend">{escape(text)}</p>' for text in (table.legend, *table.notes) if text)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + f"\n</tbody></table></div>\n{below}"
    )


def _breakable(text: str) -> str:
    """A label that breaks between its words, where the window is narrow, and then within them."""
    words = (re.sub(r"([_=,/])", r"\1<wbr>", escape(word)) for word in text.split(" "))
    return " ".join(f"<span>{word}</span>" for word in words)


def _on_two_lines(value: Value) -> str:
    first, _, second = (value.lines or value.text).partition("\n")
    return escape(first) + (f"<small>{escape(second)}</small>" if second else "")


def _picture(picture: Picture, folder: Path) -> str:
    image = base64.b64encode((folder / f"{picture.name}.png").read_bytes()).decode("ascii")
    return (
        f'<figure id="{escape(picture.name)}"><h3>{escape(picture.title)}</h3>'
        f'<div class="wide"><img alt="{escape(picture.title)}" src="data:image/png;base64,{image}"></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _runs(report: Report) -> str:
    versions: dict[str, set[str]] = {"python": {platform.python_version() + " (this report)"}}
    versions["kv-lm-eval"] = {f"{__version__} (this report)"}
    lines = []
    for row in report.rows:
        for run in row.runs:
            found = run.config.get("kv_versions") or run.point.get("versions") or {}
            more = {
                "lm-eval": run.results.get("lm_eval_version"),
                "transformers": run.results.get("transformers_version"),
            }
            for name, version in {**more, **found}.items():
                if version:
                    versions.setdefault(name, set()).add(str(version))
        seen = dict.fromkeys(line for run in row.runs for line in rerun.lines(run))
        lines.append(f"<h3>{escape(row.label)}</h3><pre>{escape(chr(10).join(seen))}</pre>")
        settings = ", ".join(f"{k}={v}" for k, v in row.first.settings.items())
        if settings:
            lines.append(f'<p class="soft">Settings: {escape(settings)}</p>')
    told = "; ".join(f"{name} {', '.join(sorted(found))}" for name, found in versions.items())
    method = (
        f"Intervals: {paired.LEVEL:.0%}, Student's t with the jackknife's error over texts; within noise: the interval "
        f"holds 0, or 5 % or more of up to {paired.DRAWS:,} random swaps of the two runs' answers, text by text, give "
        f"a larger difference (seed {paired.SEED}). Commands leave out where results were written."
    )
    commands = f"<details><summary>Commands and settings</summary>{''.join(lines)}</details>"
    return f'<p>{escape(told)}</p><p class="soft">{escape(method)}</p>{commands}'


# ---------------------------------------------------------------------------------------------- answers


def samples(
    report: Report, max_documents: int = MAX_DOCUMENTS, max_bytes: int = MAX_SAMPLE_BYTES
) -> tuple[dict[str, Any], str]:
    """The answers to show, as the page's script reads them, and a sentence on what was left out.

    Documents on which the methods' scores differ come first where not all have room.
    """
    columns = [c for c in report.columns if not c.leaves]
    tasks, said = [], []
    room = max_bytes
    for i, column in enumerate(columns):
        share = room // (len(columns) - i)
        task = _task_samples(report, column, max_documents, share)
        if task is None:
            continue
        room -= _size(task)
        tasks.append(task)
        if task["left_out"]:
            said.append(f"{column.task} {task['left_out']}")
    text = f"Left out to keep the page small: {', '.join(said)} documents." if said else "All documents are here."
    return {"tasks": tasks, "views": per_token.views(report)}, text


def _task_samples(report: Report, column: Column, max_documents: int, max_bytes: int) -> dict[str, Any] | None:
    having = [(row, found) for row in report.rows if (found := row.samples(column.task, column.filter))]
    if not having:
        return None
    documents: dict[SampleKey, dict[int, tuple[Sample, float | None]]] = {}
    for i, (row, found) in enumerate(having):
        scores = _scores(row, column, found)
        for key, sample in found.items():
            documents.setdefault(key, {})[i] = (sample, scores[key])

    def agrees(key: SampleKey) -> bool:
        return len({score for _, score in documents[key].values()}) == 1

    order = sorted(documents, key=lambda key: (agrees(key), next(iter(documents[key].values()))[0].doc_id))
    docs: list[dict[str, Any]] = []
    size = 0
    for key in order[:max_documents]:
        doc = _document(documents[key], len(having))
        size += _size(doc)
        if size > max_bytes and docs:
            break
        docs.append(doc)
    return {
        "name": f"{column.task}, {column.metric}",
        "better": column.higher_is_better,
        "rows": [row.label for row, _ in having],
        "docs": docs,
        "left_out": len(documents) - len(docs),
    }


def _size(data: Any) -> int:
    return len(json.dumps(data, ensure_ascii=False).encode(errors="replace"))


def _scores(row: Row, column: Column, found: dict[SampleKey, Sample]) -> dict[SampleKey, float | None]:
    """Each document's own score; a perplexity's pair (log-likelihood, weight) becomes the document's perplexity."""
    reported = row.cells[column].value
    values = {key: s.metrics[column.metric] for key, s in found.items() if column.metric in s.metrics}
    aggregation = (
        paired.aggregation_of([(list(values.values()), reported)]) if values and reported is not None else None
    )
    out: dict[SampleKey, float | None] = dict.fromkeys(found)
    for key, value in values.items():
        table = aggregation.table([value]) if aggregation else None
        if aggregation and table is not None:
            score = aggregation.value(table)
            out[key] = score if is_number(score) else None
        elif isinstance(value, bool) or is_number(value):
            out[key] = float(value)
    return out


def _document(answers: dict[int, tuple[Sample, float | None]], rows: int) -> dict[str, Any]:
    first = next(iter(answers.values()))[0]
    length_and_depth = "" if first.place is None else f"{first.place[0]:,} tokens, depth {first.place[1]:g} %"
    listed = [[(s := answers[i][0]).answer, answers[i][1], s.detail] if i in answers else None for i in range(rows)]
    return {
        "id": first.doc_id,
        "where": length_and_depth,
        "prompt": first.prompt_end,
        "chars": first.prompt_chars,
        "cut": first.prompt_chars > len(first.prompt_end),
        "target": first.target,
        "answers": listed,
    }


def _samples(data: dict[str, Any], said: str) -> str:
    if not data["tasks"]:
        return "<p>No answers were logged. Run with <code>--log_samples</code> to see them here.</p>"
    return (
        f'<p class="soft">{escape(said)} Where not all have room, those with different scores come first.</p>'
        '<div class="controls"><label>Task <select id="task"></select></label>'
        '<label>left <select id="left"></select></label><label>right <select id="right"></select></label>'
        '<label><input type="checkbox" id="differs"> differs only</label><span id="count" class="soft"></span></div>'
        '<div id="sample-list"></div>'
    )

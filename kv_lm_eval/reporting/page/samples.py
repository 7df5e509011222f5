"""The answers of two methods side by side: what samples.js draws of them, as many as have room."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from kv_lm_eval.reporting.answers import Sample, SampleKey
from kv_lm_eval.reporting.cells import Column, Report, Row
from kv_lm_eval.reporting.run import is_number
from kv_lm_eval.stats import paired

MAX_DOCUMENTS = 40  # a task, in the page
MAX_SAMPLE_BYTES = 3_000_000  # of all tasks together


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
        room -= size_of(task)
        tasks.append(task)
        if task["left_out"]:
            said.append(f"{column.task} {task['left_out']}")
    text = f"Left out to keep the page small: {', '.join(said)} documents." if said else "All documents are here."
    return {"tasks": tasks}, text


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
        size += size_of(doc)
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


def size_of(data: Any) -> int:
    """Bytes of it in the page."""
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


def section(data: dict[str, Any], said: str) -> str:
    """The page's part of it."""
    if not data["tasks"]:
        return "<p>No answers were logged. Run with <code>--log_samples</code> to see them here.</p>"
    return (
        f'<p class="soft">{escape(said)} Where not all have room, those with different scores come first.</p>'
        "<noscript><p>This part needs scripts; the answers are in the samples files, too.</p></noscript>"
        '<div class="controls js"><label>Task <select id="task"></select></label>'
        '<label>left <select id="left"></select></label><label>right <select id="right"></select></label>'
        '<label><input type="checkbox" id="differs"> differs only</label><span id="count" class="soft"></span></div>'
        '<div id="sample-list"></div>'
    )

"""One sample of each task, its text coloured by the divergence from the full cache: what tokens.js draws of it."""

from __future__ import annotations

from typing import Any

from kv_lm_eval.reporting.cells import Report
from kv_lm_eval.reporting.page.samples import size_of

MAX_BYTES = 1_500_000  # of all tasks together
TOLD = (
    "One sample of each task, coloured by KL(full cache || method): light from 0.001 nats on, full from 1. Of texts "
    "the stretch with the largest divergence, of questions the full cache's own answer. Point at a token, or go to it "
    "with the tabulator: what the full cache and the method held for likeliest, with their probabilities."
)


def views(report: Report) -> list[dict[str, Any]]:
    """By task, the rows that have a sample to show and what they have; each row's is of the same document.

    Rows for which there is no more room are counted.
    """
    out: list[dict[str, Any]] = []
    room = MAX_BYTES
    for column in report.columns:
        if column.leaves or any(one["name"] == column.task for one in out):
            continue
        found = [(row, row.samples(column.task, column.filter)) for row in report.rows]
        keys = [key for _, samples in found for key, sample in samples.items() if sample.view]
        if not keys:
            continue
        having = [(row, samples[keys[0]]) for row, samples in found if keys[0] in samples and samples[keys[0]].view]
        shown: list[Any] = []
        for _, sample in having:
            room -= size_of(sample.view)
            if room < 0 and shown:
                break
            shown.append(sample.view)
        labels = [row.label for row, _ in having[: len(shown)]]
        about = {"name": column.task, "document": having[0][1].doc_id, "left_out": len(having) - len(shown)}
        out.append({**about, "rows": labels, "views": shown})
    return out


def section(found: list[dict[str, Any]]) -> str:
    """The page's part of it; empty where there is nothing to show."""
    if not found:
        return ""
    return (
        f'<p class="soft">{TOLD}</p>'
        '<div class="controls js"><label>Task <select id="view-task"></select></label>'
        '<label>method <select id="view-row"></select></label><span id="view-said" class="soft"></span></div>'
        '<div id="view-text" class="tokens"></div><div id="view-tip" role="status" hidden></div>'
    )

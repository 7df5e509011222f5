"""Predictions in the official format: one `<dataset>.jsonl` a dataset, of pred, answers, all_classes and length."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kv_lm_eval.errors import UserError
from longbench_tasks import aggregate, metrics
from longbench_tasks.scoring import best_score
from longbench_tasks.specs import Spec

FIELDS = ("pred", "answers", "all_classes", "length")
TASK_PREFIX, TASK_PREFIX_E = "kv_longbench_", "kv_longbench_e_"


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of one predictions file.

    Raises:
        UserError: the file is empty, or a line is not such a row.
    """
    rows = []
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows.append({"pred": row["pred"], "answers": row["answers"],
                             "all_classes": row.get("all_classes"), "length": row.get("length")})  # fmt: skip
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}, line {number}: {error!r}; a line holds {', '.join(FIELDS)}") from error
    if not rows:
        raise UserError(f"{file} holds no predictions, so it has no score; remove it")
    return rows


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows as the official pred.py does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(json.dumps({key: row[key] for key in FIELDS}, ensure_ascii=False) + "\n")


def sample_scores(spec: Spec, rows: list[dict[str, Any]], metric: str | None = None) -> list[float]:
    """Each row's score in [0, 1]; as in the official script, the last row's classes are those of all."""
    scorer = metrics.load(metric or spec.metric)
    classes = rows[-1]["all_classes"]
    return [best_score(scorer, r["pred"], r["answers"], classes, spec.first_line_only) for r in rows]


def dataset_score(spec: Spec, rows: list[dict[str, Any]], metric: str | None = None) -> float:
    """The official number of a file."""
    return aggregate.percent(sample_scores(spec, rows, metric))


def dataset_score_e(spec: Spec, rows: list[dict[str, Any]], metric: str | None = None) -> dict[str, float]:
    """The official numbers of a LongBench-E file by bucket of length."""
    if lacking := sum(row["length"] is None for row in rows):
        raise UserError(f"{spec.dataset}: {lacking} of {len(rows)} predictions have no length, which --e needs")
    return aggregate.by_length(zip(sample_scores(spec, rows, metric), (r["length"] for r in rows), strict=True))


def dataset_of(task: str) -> tuple[str, bool]:
    """Dataset and whether it is LongBench-E, of a task's name."""
    if task.startswith(TASK_PREFIX_E):
        return task[len(TASK_PREFIX_E) :], True
    return task.removeprefix(TASK_PREFIX), False


def from_samples(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of lm-eval's samples file (--log_samples) in the order of the data, answers as the model gave them."""
    with file.open(encoding="utf-8") as stream:
        samples = sorted((json.loads(line) for line in stream if line.strip()), key=lambda s: s["doc_id"])
    for sample in samples:
        doc = sample["doc"]
        yield {**{key: doc[key] for key in FIELDS if key != "pred"}, "pred": sample["resps"][0][0]}


def task_of_samples(file: Path) -> str:
    """The task's name in `samples_<task>_<date>.jsonl`; the date has no underscore."""
    return file.stem.removeprefix("samples_").rsplit("_", 1)[0]

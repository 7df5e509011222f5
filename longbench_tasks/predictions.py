"""Predictions in the official format: one `<dataset>.jsonl` a dataset, of pred, answers, all_classes and length."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

from . import aggregate, metrics
from .rows import Prediction
from .scoring import best_score
from .specs import Spec

FIELDS = ("pred", "answers", "all_classes", "length")
One = pydantic.Field(min_length=1)
Answers = Annotated[list[Annotated[list[str], One]], One]
log = logging.getLogger("lm_eval.tasks.longbench")
TASK_PREFIX, TASK_PREFIX_E = "kv_longbench_", "kv_longbench_e_"


class Document(TypedDict):
    """What a prediction takes of a sample's document."""

    answers: list[str]
    length: int
    all_classes: NotRequired[list[str] | None]


class Sample(TypedDict):
    """What a prediction takes of a sample; the rest is passed over."""

    doc_id: int
    doc: Document
    resps: Answers


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of one predictions file; one without any reference is told, and scores 0 as in the official script.

    Raises:
        UserError: the file is empty, or a line is not such a row.
    """
    rows, empty = [], []
    for number, row in files.read_jsonl(file, Prediction):
        rows.append({key: row.get(key) for key in FIELDS})
        empty += [] if row["answers"] else [number]
    if not rows:
        raise UserError(f"{file} holds no predictions, so it has no score; remove it")
    if empty:
        log.warning("%s, line %d: answers is empty (%d lines): it scores 0, as officially", file, empty[0], len(empty))
    return rows


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows as the official pred.py does."""
    lines = (json.dumps({key: row[key] for key in FIELDS}, ensure_ascii=False) + "\n" for row in rows)
    files.write_whole(file, "".join(lines))


def sample_scores(spec: Spec, rows: list[dict[str, Any]], metric: str | None = None) -> list[float]:
    """Each row's score in [0, 1]; as in the official script, the last row's classes are those of all."""
    scorer = metrics.load(metric or spec.metric)
    classes = rows[-1]["all_classes"]
    if not classes and metrics.needs_classes(metric or spec.metric):
        raise UserError(f"{spec.dataset}: the last prediction has no all_classes, with which every score compares")
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
    """Rows of lm-eval's samples file (--log_samples) in the order of the data, answers as the model gave them.

    Raises:
        UserError: the file is damaged, or is none of a LongBench task.
    """
    samples = sorted((sample for _, sample in files.read_jsonl(file, Sample)), key=lambda s: s["doc_id"])
    if not samples:
        raise UserError(f"{file} holds no samples")
    for sample in samples:
        yield {**{key: sample["doc"].get(key) for key in FIELDS if key != "pred"}, "pred": sample["resps"][0][0]}


def task_of_samples(file: Path) -> str:
    """The task's name in `samples_<task>_<date>.jsonl`; the date has no underscore."""
    return file.stem.removeprefix("samples_").rsplit("_", 1)[0]

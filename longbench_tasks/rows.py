"""What a row of LongBench and a prediction must be: the one schema of each, whatever file they come from.

A row needs what its prompt names, its references, its length and, where the metric compares with all classes, these.
The other fields of the official files may be absent, and further fields may be there.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import pydantic
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

from . import metrics
from .specs import Spec

FIELDS = ("input", "context", "answers", "length", "dataset", "language", "all_classes", "_id")  # of the official files
Names = Annotated[list[str], pydantic.Field(min_length=1)]
MORE = pydantic.ConfigDict(extra="allow")


class Row(TypedDict):
    """A line of the official data."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    input: NotRequired[str | None]
    context: NotRequired[str | None]
    answers: Names
    length: Annotated[int, pydantic.Field(ge=0)]
    dataset: NotRequired[str | None]
    language: NotRequired[str | None]
    all_classes: NotRequired[Names | None]
    _id: NotRequired[str | int | None]


class Prediction(TypedDict):
    """A line of `<dataset>.jsonl` as the official pred.py writes it; the official eval.py reads no other field."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    pred: str
    answers: list[str]
    all_classes: NotRequired[Names | None]
    length: NotRequired[int | None]


def checked(lines: Iterable[tuple[str, Any]], spec: Spec | None) -> Iterator[dict[str, Any]]:
    """Rows of a dataset, from (place, value) pairs; absent fields of the official files are None.

    Args:
        spec: what the rows are for; None checks no more than what all datasets have in common.

    Raises:
        UserError: names the first place and field at which a row is not one of this dataset.
    """
    seen: dict[Any, str] = {}
    for place, value in lines:
        row = {**dict.fromkeys(FIELDS), **files.check(value, Row, place)}
        if spec is not None:
            if (name := row["_id"]) is not None and (first := seen.setdefault(name, place)) != place:
                raise UserError(f"{place}: _id: {name!r} is that of {first} too; a row counts once")
            _check_use(place, row, spec)
        yield row


def _check_use(place: str, row: dict[str, Any], spec: Spec) -> None:
    needed = {field: "the prompt names it" for _, field, _, _ in string.Formatter().parse(spec.prompt) if field}
    if metrics.needs_classes(spec.metric):
        needed["all_classes"] = f"the metric {spec.metric} compares with it"
    for field, why in needed.items():
        if row.get(field) is None:
            raise UserError(f"{place}: {field}: is missing or null, and {why}")
    for answer in row["answers"]:
        check_reference(place, answer, row["all_classes"], spec.metric)


def check_reference(place: str, answer: str, classes: list[str] | None, metric: str) -> None:
    """Raises UserError where an answer is nothing that a metric could compare with."""
    try:
        metrics.load(metric)("0", answer, classes)
    except Exception as error:  # whatever a scorer does not expect: it would end the run after the last answer
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{place}: answers: {answer!r} is no reference for the metric {metric} ({reason})") from None

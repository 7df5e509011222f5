"""The rows of InfiniteBench: its `<task>.jsonl` files, or the hub's copies at a commit."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from pydantic import ConfigDict
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

from .. import metrics, rows
from ..sources import Source, of_hub_file
from ..specs import Spec

REPOSITORY = "xinrongzhang2022/InfiniteBench"
LETTERS = "ABCD"
ADVICE = (
    f"Download the .jsonl files of https://huggingface.co/datasets/{REPOSITORY} and name their folder: --metadata "
    f'\'{{"infinitebench_dir": "FOLDER"}}\'; or "hub@COMMIT" for a commit of {REPOSITORY} (a branch may change)'
)


class Row(TypedDict):
    """A line of the official data."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    context: str
    input: str
    answer: str | int | float | list[str | int | float]
    options: NotRequired[list[str] | None]


def load_rows(spec: Spec, where: str | None) -> tuple[list[dict[str, Any]], str]:
    """The documents of a data set in their order, with the fields that its prompt names, and where they come from.

    Any of several answers counts, as officially in En.QA and En.Dia; the rows of the others have one.

    Raises:
        UserError: there are none, or one that is no row of this data set; says what to do.
    """
    name = f"{spec.dataset}.jsonl"
    source = Source("InfiniteBench", REPOSITORY, "infinitebench_dir", (name,), partial(of_hub_file, name=name), ADVICE)
    found, place = source.read(where)
    return [_document(spec, at, files.check(row, Row, at)) for at, row in found], place


def _document(spec: Spec, place: str, row: Row) -> dict[str, Any]:
    said = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    answers = [str(answer) for answer in said]
    if not answers:
        raise UserError(f"{place}: answer: is empty")
    document: dict[str, Any] = {"context": row["context"], "input": row["input"], "answers": answers}
    if metrics.needs_classes(spec.metric):
        options = row.get("options") or []
        if len(options) != len(LETTERS) or answers[0] not in options:
            raise UserError(f"{place}: options: {spec.dataset} needs four, the answer among them, got {options}")
        document |= {f"OPTION_{letter}": option for letter, option in zip(LETTERS, options, strict=True)}
        document |= {"answers": answers[:1], "all_classes": options}
    for answer in document["answers"]:
        rows.check_reference(f"{place}: answer", answer, document.get("all_classes"), spec.metric)
    if "{prefix}" in spec.prompt:
        document["prefix"] = _prefix(place, row["input"])
    return document


def _prefix(place: str, asked: str) -> str:
    """What Math.Find asks, said before its list too."""
    if (found := re.search("The .+ of", asked)) is None:
        raise UserError(f"{place}: input: {asked!r} does not say which number is asked for (The ... of)")
    return f"What is {found[0].lower()[: -len(' of')]} in the following list?"

"""The rows of LongBench v2: its data.json, a jsonl file of the same rows, or the hub's copy at a commit."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

from pydantic import ConfigDict
from typing_extensions import TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

from .. import predictions
from ..sources import Source, of_data_set

REPOSITORY = "THUDM/LongBench-v2"  # now also zai-org/LongBench-v2
SOURCE = Source(
    "LongBench v2",
    REPOSITORY,
    "longbench2_dir",
    ("data.json", "data.jsonl"),
    partial(of_data_set, split="train"),
    f"Download https://huggingface.co/datasets/{REPOSITORY}/resolve/main/data.json and name it: --metadata "
    f'\'{{"longbench2_dir": "FOLDER"}}\'; or "hub@COMMIT" for a commit of {REPOSITORY} (a branch may change)',
)


class Row(TypedDict):
    """A question."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    _id: str
    domain: str
    difficulty: str
    length: str
    question: str
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: Literal["A", "B", "C", "D"]
    context: str


class Sample(TypedDict):
    """What is read of an answer of the first question of two."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    doc: dict[str, Any]
    resps: predictions.Answers


def load_rows(where: str | None) -> tuple[list[dict[str, Any]], str]:
    """The rows in their order and where they come from.

    Raises:
        UserError: there are none, or one that is no question; says what to do.
    """
    found, source = SOURCE.read(where)
    rows, known = [], dict[str, str]()
    for place, value in found:
        row = files.check(value, Row, place)
        if (first := known.setdefault(row["_id"], place)) != place:
            raise UserError(f"{place}: _id: {row['_id']!r} is that of {first} too; a question counts once")
        rows.append(dict(row))
    return rows, source


def with_reasoning(rows: Iterable[dict[str, Any]], samples: str | None) -> list[dict[str, Any]]:
    """The rows that an earlier run has reasoned about, with its text in the field `cot`.

    Args:
        samples: its samples_kv_longbench2_cot_*.jsonl.

    Raises:
        UserError: none is named, or it is of other questions.
    """
    if samples is None:
        raise UserError(
            "the second question of LongBench v2's CoT is about the first one's answers: run kv_longbench2_cot with "
            '--log_samples first, and name its file: --metadata \'{"longbench2_cot": "samples_....jsonl"}\''
        )
    said = {}
    for number, sample in files.read_jsonl(samples, Sample):
        if not isinstance(name := sample["doc"].get("_id"), str):
            raise UserError(f"{samples}, line {number}: doc: _id: is missing; no sample of kv_longbench2_cot")
        said[name] = sample["resps"][0][0].strip()
    found = [{**row, "cot": said[row["_id"]]} for row in rows if said.get(row["_id"])]
    if not found:
        raise UserError(f"{samples}: none of its questions is in the data")
    return found

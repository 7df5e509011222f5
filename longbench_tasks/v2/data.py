"""The rows of LongBench v2: its data.json, a jsonl file of the same rows, or the hub's copy at a commit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from typing_extensions import TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

from .. import predictions

REPOSITORY = "THUDM/LongBench-v2"  # now also zai-org/LongBench-v2
FILES = ("data.json", "data.jsonl")
WHERE = (
    f"Download https://huggingface.co/datasets/{REPOSITORY}/resolve/main/data.json and name it: --metadata "
    f'\'{{"longbench2_dir": "FOLDER"}}\'; or "hub@COMMIT" for a commit of {REPOSITORY} (a branch may change)'
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
    """The rows in their order, each with its number in the field `row`, and where they come from.

    Raises:
        UserError: there are none, or one that is no question; says what to do.
    """
    if where is None:
        raise UserError(f"where is LongBench v2? {WHERE}")
    rows, source = _of_hub(where) if where.startswith("hub") else _of_folder(Path(where).expanduser())
    if not rows:
        raise UserError(f"{source} holds no questions. {WHERE}")
    known: dict[str, str] = {}
    for number, (place, row) in enumerate(rows):
        if (first := known.setdefault(row["_id"], place)) != place:
            raise UserError(f"{place}: _id: {row['_id']!r} is that of {first} too; a question counts once")
        row["row"] = number
    return [row for _, row in rows], source


def _of_folder(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"longbench2_dir={path}: neither {' nor '.join(FILES)} is in {path.resolve()}. {WHERE}")
    if file.suffix == ".jsonl":
        return [(f"{file}, line {n}", dict(row)) for n, row in files.read_jsonl(file, Row)], str(file)
    rows = files.read_json(file, list[dict[str, Any]])
    return _checked(rows, str(file)), str(file)


def _checked(rows: Iterable[Any], source: str) -> list[tuple[str, dict[str, Any]]]:
    return [(place, files.check(row, Row, place)) for n, row in enumerate(rows) if (place := f"{source}, row {n}")]


def _of_hub(where: str) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    revision = where.partition("@")[2]
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(f"longbench2_dir={where}: name a commit by its 40 digits. {WHERE}")
    from datasets import load_dataset

    try:
        data = list(load_dataset(REPOSITORY, split="train", revision=revision))
    except Exception as error:  # whatever datasets and the hub raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"longbench2_dir={where} could not be loaded ({reason}). {WHERE}") from error
    return _checked(data, f"{REPOSITORY}@{revision}"), f"{REPOSITORY}@{revision}"


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

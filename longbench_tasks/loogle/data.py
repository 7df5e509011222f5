"""The rows of LooGLE: its `<task>.jsonl` files (a text and its questions a line), or the hub's rows at a commit."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from pydantic import ConfigDict
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

from ..sources import Source, of_data_set
from ..specs import Spec

REPOSITORY = "bigainlco/LooGLE"
ADVICE = (
    f"Download data.zip of https://huggingface.co/datasets/{REPOSITORY}, unpack it and name its folder: --metadata "
    f'\'{{"loogle_dir": "FOLDER"}}\'; or "hub@COMMIT" for a commit of {REPOSITORY} (a branch may change)'
)
MORE = ConfigDict(extra="allow")
Answer = str | dict[str, str] | list[str]  # a text; the masked names of a cloze, with or without their masks


class Text(TypedDict):
    """A line of the official data: a text and what is asked of it."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    input: str
    qa_pairs: str | list[dict[str, Any]]
    output: NotRequired[str | None]


class Pair(TypedDict):
    """A question of a text."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    Q: str
    A: Answer


class Asked(TypedDict):
    """A row of the hub: a question with its text; a summary has no question."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    context: str
    question: NotRequired[str | None]
    answer: Answer


def load_rows(spec: Spec, where: str | None) -> tuple[list[dict[str, Any]], str]:
    """A document a question, in order (context, question, answers), and where they come from.

    Raises:
        UserError: there are none, or a row that is none of this data set; says what to do.
    """
    name, asks = spec.dataset, "{question}" in spec.prompt
    of_hub = partial(of_data_set, configuration=name if asks else name.removeprefix("longdep_"))
    source = Source("LooGLE", REPOSITORY, "loogle_dir", (f"{name}.jsonl",), of_hub, ADVICE)
    found, place = source.read(where)
    return [_document(*one) for at, value in found for one in _questions(at, value, asks)], place


def _questions(place: str, value: Any, asks: bool) -> Iterator[tuple[str, str, str, Answer]]:
    """Where a question stands, its text, its words ("" for a summary) and its answer."""
    if isinstance(value, dict) and "qa_pairs" not in value:
        row: Asked = files.check(value, Asked, place)
        yield place, row["context"], (row.get("question") or "") if asks else "", row["answer"]
        return
    text: Text = files.check(value, Text, place)
    if not asks:
        yield place, text["input"], "", files.check(text.get("output"), str, f"{place}: output")
        return
    pairs = _literal(place, text["qa_pairs"]) if isinstance(text["qa_pairs"], str) else text["qa_pairs"]
    for pair in files.check(pairs, list[Pair], f"{place}: qa_pairs"):
        yield place, text["input"], pair["Q"], pair["A"]


def _literal(place: str, text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{place}: qa_pairs: {text[:40]!r} is no list of questions ({error})") from None


def _document(place: str, context: str, question: str, answer: Answer) -> dict[str, Any]:
    if not answer or not context:
        raise UserError(f"{place}: a text and an answer must not be empty")
    if isinstance(answer, list):
        answer = {f"<mask-{n}>": name for n, name in enumerate(answer)}
    said = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    return {"context": context, "question": question, "answers": [said]}

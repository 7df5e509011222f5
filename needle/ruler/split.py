"""A RULER prompt as context, question and beginning of the answer, and the layout of simonjegou/ruler that comes of it.

Reference: NVIDIA/kvpress, evaluation/benchmarks/ruler/create_huggingface_dataset.py (patterns, tokens to generate).
Deviations: none.
"""

from __future__ import annotations

import re
from typing import Any

from typing_extensions import TypedDict

from kv_lm_eval.errors import UserError
from kv_lm_eval.requests.boundaries import RULER_QUESTIONS

ANSWERS = {"niah": re.compile(r"The special magic")}  # in the question's part, the first match; the others' is:
ANSWER = re.compile(r"Answer:")
TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
MAX_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


class Row(TypedDict):
    """A row as kvpress has it."""

    context: str
    question: str
    answer_prefix: str
    answer: list[str]
    task: str
    max_new_tokens: int


def kind(task: str) -> str:
    """niah, vt, cwe, fwe or qa: what a task's name begins with."""
    return task.split("_")[0]


def row(task: str, text: str, outputs: list[str]) -> Row:
    """The row of a whole prompt, its beginning of the answer included.

    Raises:
        UserError: the wording is not RULER's.
    """
    asked = list(RULER_QUESTIONS[kind(task)].finditer(text))
    begins = ANSWERS.get(kind(task), ANSWER).search(text, asked[-1].start()) if asked else None
    if begins is None:
        raise UserError(
            f"{task}: a prompt has no question or no beginning of the answer in RULER's words, so that it cannot be "
            f"split: ...{text[-120:]!r}"
        )
    at = asked[-1].start()
    return Row(
        context=text[:at],
        question=text[at : begins.start()],
        answer_prefix=text[begins.start() :],
        answer=list(outputs),
        task=task,
        max_new_tokens=MAX_NEW_TOKENS[kind(task)],
    )


def whole(row: Row | dict[str, Any]) -> str:
    """The official prompt of a row: its three parts as they stand."""
    return row["context"] + row["question"] + row["answer_prefix"]

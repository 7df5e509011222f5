"""NVIDIA/kvpress's leaderboard: how a row becomes a prompt, and how an answer is scored.

A row's context and question go into one user turn of the tokenizer's chat template. Template head and context are
compressed; question, template tail and beginning of the answer are fed after it. The two are tokenised apart, without
special tokens, so that no token reaches over the border.

Reference: NVIDIA/kvpress 0.5.5, kvpress/pipeline.py (preprocess), evaluation/evaluate.py (compress_questions) and
evaluation/benchmarks/ruler/calculate_metrics.py.
Deviations: an answer that begins with an end token is empty (there: it goes on, since the first token is not looked
at); a context beyond the model's maximum is refused (there: it loses its end).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .split import kind

CONTROL = re.compile(r"[\x00-\x1f]")


def parts(row: Mapping[str, Any], tokenizer: Any, compress_questions: bool = False) -> tuple[str, str]:
    """What is compressed of a row, and what is fed after it."""
    context, question = row["context"], row["question"]
    if compress_questions:
        context, question = context + question, ""
    if tokenizer.chat_template is None:
        return (tokenizer.bos_token or "") + context, question + "\n" + row["answer_prefix"]
    border = "\n" + "#" * len(context)  # stands nowhere in a context, and no template takes it off
    head, tail = tokenizer.apply_chat_template(
        [{"role": "user", "content": context + border}],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,
    ).split(border)
    return head, question + tail + row["answer_prefix"]


def score(task: str, answer: str, references: Sequence[str], replaced_by: str = "") -> float:
    """Share of the references that occur in an answer, case ignored; of a qa task 1 where any does.

    Args:
        replaced_by: what stands for a control character: nothing in kvpress, a line break in RULER's own scorer.
    """
    answer = CONTROL.sub(replaced_by, answer.strip()).strip().lower()
    found = [reference.lower() in answer for reference in references]
    return float(any(found)) if kind(task) == "qa" else sum(found) / len(found)

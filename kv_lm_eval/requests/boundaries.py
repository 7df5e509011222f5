"""Where the question begins in a prompt: with question_in_prompt=False, what stands before it is compressed unseen.

A prompt is one text, few-shot examples, chat template and instructions included. Its question is the text of a field
of the document, at its last occurrence in the prompt; the question and all that follows it are the tail of the prompt,
which is fed over the compressed cache. A document whose question is empty (a summary, code to go on with) has the rest
of the prompt after its context as its tail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kv_lm_eval.errors import UserError

QUESTION_FIELDS = ("question", "input", "query", "problem", "goal")  # tried in this order
CONTEXT_FIELDS = ("context", "passage", "article", "text")  # where a context ends is looked for by its last characters
CONTEXT_END = 40  # as many of them: a context may have lost its middle, not its end


@dataclass(frozen=True)
class Boundary:
    """A prompt's tail, in tokens counted from its end; `empty`: its document has no question of its own."""

    tail_tokens: int
    empty: bool


def rows(found: Sequence[Boundary]) -> dict[str, list[int]]:
    """A batch's boundaries as the log wants them."""
    return {"question_tokens": [b.tail_tokens for b in found], "question_empty": [b.empty for b in found]}


def find_all(requests: Sequence[Any], field: str | None, tokens_from: Callable[[str, int], int]) -> dict[str, Boundary]:
    """The boundary of every prompt of lm-eval's requests, by prompt; an empty one has none."""
    found: dict[str, Boundary] = {}
    for request in requests:
        prompt = request.args[0]
        if prompt and prompt not in found:
            doc = request.doc if isinstance(request.doc, dict) else {}
            # lm-eval moves the spaces at the end of a context to its continuations
            text = prompt.rstrip() if request.request_type == "loglikelihood" else prompt
            found[prompt] = find(text, doc, field, request.task_name or "", tokens_from)
    return found


def find(
    prompt: str, doc: Mapping[str, Any], field: str | None, task: str, tokens_from: Callable[[str, int], int]
) -> Boundary:
    """The boundary of one prompt.

    Args:
        field: the document's field with the question; None: the first of QUESTION_FIELDS that is found in the prompt.
        tokens_from: tokens from a character of a text on, of the tokenizer in use.

    Raises:
        UserError: no such field, or its text is not in the prompt.
    """
    fields = QUESTION_FIELDS if field is None else (field,)
    texts = {name: doc[name].strip() for name in fields if isinstance(doc.get(name), str)}
    for text in filter(None, texts.values()):
        if (start := prompt.rfind(text)) >= 0:
            return Boundary(max(1, tokens_from(prompt, start)), False)
    if "" in texts.values():
        return Boundary(max(1, tokens_from(prompt, _end_of_context(prompt, doc))), True)
    if texts:
        lacking = f"the text of its {' or '.join(texts)} is not in the prompt"
    else:
        lacking = f"its document has no text named {' or '.join(fields)}, only {', '.join(sorted(doc)) or 'nothing'}"
    raise UserError(
        f"question_in_prompt=False: where does the question begin in a prompt of {task or 'this task'}? {lacking}. "
        "Name the field that holds it with question_field=..., or compress the whole prompt with "
        "question_in_prompt=True."
    )


def _end_of_context(prompt: str, doc: Mapping[str, Any]) -> int:
    """The first character after the context, the prompt's end where no context is found in it."""
    for name in CONTEXT_FIELDS:
        if isinstance(doc.get(name), str) and (text := doc[name].rstrip()[-CONTEXT_END:]):
            start = prompt.rfind(text)
            if start >= 0:
                return start + len(text)
    return len(prompt)


def tokens_by_offsets(offsets: Sequence[tuple[int, int]], start: int) -> int:
    """Tokens from the first one on that reaches beyond the character `start`: those before lie wholly before it."""
    first = next((i for i, (_, end) in enumerate(offsets) if end > start), len(offsets))
    return len(offsets) - first


def tokens_by_prefix(encode: Callable[[str], list[int]], text: str, start: int) -> int:
    """The same for a tokenizer that gives no offsets.

    The tokens that the whole text and its part before `start` have in common at their beginning lie wholly before
    `start`, since they also spell that part; where the part's end is split otherwise when alone, it counts as tail.
    """
    whole = encode(text)
    return len(whole) - len(os.path.commonprefix([whole, encode(text[:start])]))

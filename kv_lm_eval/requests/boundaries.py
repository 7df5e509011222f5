"""Where the question begins in a prompt: with question_in_prompt=False, what stands before it is compressed unseen.

A prompt is one text, few-shot examples, chat template and instructions included. The question and all that follows it
are the tail of the prompt, which is fed over the compressed cache. A task that makes its own prompts says where its
question begins (BEGINS). Else it is the text of a field of the document, where it last stands in the prompt as words of
its own, but not inside the document's context: a context may hold the same words. A document whose question is empty (a
summary, code to go on with), or whose task asks it in other words, has the rest of the prompt after its context as its
tail. A field that holds the whole prompt is no question; what it asks is then looked for in the wording of RULER, whose
documents are like that.

A boundary that leaves (nearly) nothing before it would compress nothing under the name of this protocol: it is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kv_lm_eval.errors import UserError

QUESTION_FIELDS = ("question", "input", "query", "problem", "goal")  # tried in this order
CONTEXT_FIELDS = ("context", "passage", "article", "text")  # where a context ends is looked for by its last characters
CONTEXT_END = 40  # as many of them: a context may have lost its middle, not its end
BEGINS = "question_begins"  # of a document: the character of its prompt where its question begins
APART = "tokenised_apart"  # of a document: the prompt's two parts are, without special tokens
LEAST_CONTEXT = 0.1  # of a prompt's tokens must stand before its question
# Where kvpress splits RULER's prompts (simonjegou/ruler); the last match counts, since examples may come before it.
RULER_QUESTIONS = {
    "niah": re.compile(r"What (?:is|are all) the special magic"),
    "vt": re.compile(r"Question: Find all variables that are assigned the value"),
    "cwe": re.compile(r"Question: What are the 10 most common words in the above list\?"),
    "fwe": re.compile(r"Question: Do not provide any explanation\."),
    "qa": re.compile(r"Answer the question based on the given documents\."),
}
RULER_QUESTION = re.compile("|".join(one.pattern for one in RULER_QUESTIONS.values()))
TokensFrom = Callable[[str, int], int]  # tokens from a character of a text on, of the tokenizer in use
Encode = Callable[[str], Sequence[Any]]  # without special tokens


@dataclass(frozen=True)
class Boundary:
    """A prompt's tail, in tokens counted from its end; `empty`: its document has no question of its own."""

    tail_tokens: int
    empty: bool


def apart(prompt: str, doc: Any) -> tuple[str, str] | None:
    """The two parts of a prompt that are tokenised apart, where its document says so."""
    if not isinstance(doc, dict) or not doc.get(APART):
        return None
    return prompt[: doc[BEGINS]], prompt[doc[BEGINS] :]


def find_all(
    requests: Sequence[Any],
    field: str | None,
    tokens_from: TokensFrom,
    called: Callable[[int], str],
    encode: Encode | None = None,
) -> list[Boundary | None]:
    """The boundary of every request; None for an empty prompt.

    Args:
        called: a request's name in an error. encode: for prompts whose parts are tokenised apart.

    Raises:
        UserError: before any work is done, as `find`.
    """
    tokens_from = lru_cache(maxsize=256)(tokens_from)  # choices share their context
    found: list[Boundary | None] = []
    for i, request in enumerate(requests):
        prompt, doc = request.args[0], request.doc if isinstance(request.doc, dict) else {}
        # lm-eval moves the spaces at the end of a context to its continuations
        text = prompt.rstrip() if request.request_type == "loglikelihood" else prompt
        if encode is not None and (parts := apart(prompt, doc)) is not None:
            found.append(Boundary(max(1, len(encode(parts[1]))), False))
        else:
            found.append(find(text, doc, field, called(i), tokens_from) if text else None)
    return found


def find(prompt: str, doc: Mapping[str, Any], field: str | None, name: str, tokens_from: TokensFrom) -> Boundary:
    """The boundary of one prompt.

    Args:
        field: the document's field with the question; None: the first of QUESTION_FIELDS that is found in the prompt
            and leaves a context before it.
        name: of the request, for errors.

    Raises:
        UserError: no such field, its text is not in the prompt, or it leaves nearly nothing before it.
    """
    if field is None and isinstance(begins := doc.get(BEGINS), int):
        return Boundary(max(1, tokens_from(prompt, begins)), False)
    fields = QUESTION_FIELDS if field is None else (field,)
    texts = {key: doc[key].strip() for key in fields if isinstance(doc.get(key), str)}
    whole, refused = tokens_from(prompt, 0), None
    for key, text in texts.items():
        if text and (start := _last(text, prompt, _context(prompt, doc))) >= 0:
            tail = max(1, tokens_from(prompt, start))
            if leaves_context(whole, tail):
                return Boundary(tail, False)
            refused = refused or f"from the text of its {key} on it has {tail} of its {whole} tokens"
    if refused and (asked := [match.start() for match in RULER_QUESTION.finditer(prompt)]):
        tail = max(1, tokens_from(prompt, asked[-1]))
        if leaves_context(whole, tail):
            return Boundary(tail, False)
    if refused:
        raise UserError(_too_little(name, refused))
    end = _context(prompt, doc)[1]
    if "" in texts.values():
        return Boundary(max(1, tokens_from(prompt, end)), True)
    if field is None and texts and prompt[end:].strip():  # its words were changed on the way into the prompt
        return Boundary(max(1, tokens_from(prompt, end)), False)
    if texts:
        lacking = f"the text of its {' or '.join(texts)} is not in the prompt"
        lacking += " outside its context" * (end < len(prompt))
    else:
        lacking = f"its document has no text named {' or '.join(fields)}, only {', '.join(sorted(doc)) or 'nothing'}"
    raise UserError(
        f"question_in_prompt=False: where does the question begin in a prompt of {name}? {lacking}. "
        "Name the field that holds it with question_field=..., or compress the whole prompt with "
        "question_in_prompt=True."
    )


def _last(text: str, prompt: str, context: tuple[int, int]) -> int:
    """Where a text last begins in a prompt outside of its context, -1 where it does not.

    Rather as words of its own than inside others: "A" is not in "Answer:". What ends with the context is not inside it.
    """
    before, after = (r"(?<!\w)" if re.match(r"\w", text) else "", r"(?!\w)" if re.search(r"\w\Z", text) else "")
    for pattern in (before + re.escape(text) + after, re.escape(text)):
        found = [m.start() for m in re.finditer(f"(?={pattern})", prompt)]
        if outside := [at for at in found if not (context[0] <= at and at + len(text) < context[1])]:
            return outside[-1]
    return -1


def leaves_context(tokens: int, tail_tokens: int) -> bool:
    """Whether enough of a prompt stands before its tail for a compression of it to mean anything."""
    return tokens - tail_tokens >= LEAST_CONTEXT * tokens


def check(tokens: int, boundary: Boundary, name: str) -> None:
    """Refuses a prompt of which, as it is fed, nearly nothing stands before its question.

    Raises:
        UserError: the question and what follows it are all but the whole prompt.
    """
    asked = min(tokens, boundary.tail_tokens)
    if not leaves_context(tokens, asked):
        raise UserError(_too_little(name, f"its question and what follows have {asked} of its {tokens} tokens"))


def _too_little(name: str, got: str) -> str:
    return (
        f"question_in_prompt=False: a prompt of {name} has nearly no context before its question ({got}; at least "
        f"{LEAST_CONTEXT:.0%} must stand before it), so nothing would be compressed and the score would be the full "
        "cache's. Name the field that holds the question alone with question_field=..., take prompts with a context "
        "(documents, few-shot examples), or compress the whole prompt with question_in_prompt=True."
    )


def _context(prompt: str, doc: Mapping[str, Any]) -> tuple[int, int]:
    """First character of the document's context in a prompt and the first after it; twice the prompt's end where no
    context is found in it. It may have lost its middle, or its beginning."""
    for name in CONTEXT_FIELDS:
        if isinstance(doc.get(name), str) and (text := doc[name].strip()):
            last = prompt.rfind(text[-CONTEXT_END:])
            if last >= 0:
                end = last + len(text[-CONTEXT_END:])
                agreed = end - len(os.path.commonprefix([prompt[:end][::-1], text[::-1]]))  # as far back as they do
                first = prompt.rfind(text[:CONTEXT_END], 0, agreed)
                return (first if first >= 0 and agreed > end - len(text) else agreed), end
    return len(prompt), len(prompt)


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

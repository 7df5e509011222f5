"""Where a prompt holds what its answer says: an answer's tokens, and the tokens of the prompt that they are read from.

A document's expected strings are evidence where they stand in its prompt before the question, as a needle's value does.
Of every such string that the full cache's answer repeats, the answer's tokens are known and the prompt's, so that a
divergence can be told by whether the latter are still in the cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kv_lm_eval.requests.boundaries import APART, TokensFrom

FIELDS = ("evidence", "expected", "answer", "outputs")  # of a document, the first that it has: texts, or a list of them
MOST_PLACES = 8  # a string that stands in more of them is no one fact


@dataclass(frozen=True)
class Piece:
    """An answer's tokens from `start` to `stop`, and the prompt's tokens, by place, that say the same."""

    start: int
    stop: int
    places: tuple[int, ...]


def pieces(
    prompt: str,
    doc: Mapping[str, Any],
    fed: int,
    tokens_from: TokensFrom,
    answer: Sequence[int],
    decode: Callable[[Sequence[int]], str],
) -> list[Piece]:
    """What an answer repeats of its prompt's evidence.

    Args:
        fed: tokens of the prompt that are fed, its last ones. tokens_from: of the prompt from a character on.
        answer: token ids. decode: of these.
    """
    if doc.get(APART):  # its parts' tokens are not those of the whole text
        return []
    before = _context(prompt, doc)
    ends = [len(decode(answer[: i + 1])) for i in range(len(answer))]
    said, out = decode(answer), []
    for text in _texts(doc):
        stands = [m.start() for m in re.finditer(re.escape(text), before)]
        at = said.find(text)
        if at < 0 or not 0 < len(stands) <= MOST_PLACES:
            continue
        own = [i for i, end in enumerate(ends) if end > at and (ends[i - 1] if i else 0) < at + len(text)]
        found = {
            place
            for start in stands
            for place in range(fed - tokens_from(prompt, start), fed - tokens_from(prompt, start + len(text) - 1) + 1)
        }
        if own and found and min(found) >= 0:
            out.append(Piece(own[0], own[-1] + 1, tuple(sorted(found))))
    return out


def _texts(doc: Mapping[str, Any]) -> Iterator[str]:
    found = next((doc[name] for name in FIELDS if doc.get(name)), ())
    for text in dict.fromkeys([found] if isinstance(found, str) else found if isinstance(found, (list, tuple)) else ()):
        if isinstance(text, str) and len(text.strip()) > 1:
            yield text.strip()


def _context(prompt: str, doc: Mapping[str, Any]) -> str:
    """The prompt up to its question, or to the end of its context, where it has these."""
    question = doc.get("question")
    end = prompt.rfind(question.strip()) if isinstance(question, str) and question.strip() else -1
    return prompt[:end] if end > 0 else prompt

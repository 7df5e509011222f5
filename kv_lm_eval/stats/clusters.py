"""Which documents belong together: those about one text share what is hard about it, so they are one observation.

By what the documents themselves say, in this order:
- the task's own word, a field `cluster` (needles: one filler carries all depths of a length and sample);
- a field named after a text (context, passage, article, ...) with the same content;
- any other text of 200 characters or more that is the same, unless most documents of the task have it, such as an
  instruction;
- else each document is one of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMED = re.compile(r"(context|ctx|passage|paragraph|article|document|story|text|premise|page|book)s?(_id|_text)?", re.I)
LONG = 200  # characters


@dataclass(frozen=True)
class Texts:
    """Digests of what a document is about: certain ones, and long texts of other names."""

    sure: tuple[str, ...] = ()
    other: tuple[str, ...] = ()


def texts_of(doc: Any, own: str) -> Texts:
    """What a document is about; `own` stands for the document itself."""
    doc = doc if isinstance(doc, Mapping) else {}
    if doc.get("cluster") not in (None, ""):
        return Texts((_digest("cluster", doc["cluster"]),))
    named = [_digest("text", v) for k, v in doc.items() if (m := NAMED.fullmatch(str(k))) and _says(v, m[2])]
    other = [_digest("text", v) for v in doc.values() if isinstance(v, str) and len(v) >= LONG]
    return Texts(tuple(named) or (_digest("own", own),), tuple(d for d in other if d not in named))


def _says(value: Any, of: str | None) -> bool:
    """Whether a value names a text: a number does so only as the text's id."""
    return bool(value) and isinstance(value, (str, list, dict)) or (of == "_id" and isinstance(value, int))


def _digest(kind: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(f"{kind}:{text}".encode(errors="replace")).hexdigest()[:16]


def label(tasks: Sequence[Sequence[Texts]]) -> list[NDArray[np.int64]]:
    """The cluster of every document, by task, numbered over all of them: tasks may ask about the same texts."""
    above: dict[str, str] = {}

    def root(key: str) -> str:
        while (up := above.setdefault(key, key)) != key:
            above[key] = key = above.setdefault(up, up)
        return key

    for documents in tasks:
        often = Counter(d for texts in documents for d in set(texts.other))
        for texts in documents:
            own = [*texts.sure, *(d for d in texts.other if 2 * often[d] <= len(documents))]
            for key in own[1:]:
                above[root(key)] = root(own[0])
    numbers: dict[str, int] = {}
    return [
        np.array([numbers.setdefault(root(t.sure[0]), len(numbers)) for t in documents], dtype=np.int64)
        for documents in tasks
    ]

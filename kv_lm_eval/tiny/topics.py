"""Python's own help topics (`pydoc_data.topics`) as text that every installation has, split into training and held out.

The text differs between Python versions: results name it by `sha256`. A paragraph of a held-out topic that another
topic repeats is removed from the training side, so that no held-out paragraph was ever trained on.
"""

from __future__ import annotations

import hashlib
from pydoc_data.topics import topics

HELD_OUT = ("debugger", "execmodel", "import", "naming", "assignment", "async")


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip("\n") for paragraph in text.split("\n\n") if paragraph.strip()]


def held_out() -> dict[str, str]:
    """Returns the held-out topics of this Python version, by key."""
    return {key: topics[key] for key in HELD_OUT if key in topics}


def training() -> list[str]:
    """Returns the other topics without any paragraph that also occurs in a held-out topic."""
    hidden = {paragraph for text in held_out().values() for paragraph in _paragraphs(text)}
    kept = ([p for p in _paragraphs(topics[key]) if p not in hidden] for key in sorted(topics) if key not in HELD_OUT)
    return ["\n\n".join(paragraphs) for paragraphs in kept if paragraphs]


def sha256(text: str) -> str:
    """Returns the hexadecimal SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()

"""jieba with its own dictionary: words that a user has added to the global one do not change scores."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _cutter() -> Any:
    import jieba

    jieba.setLogLevel(logging.WARNING)
    return jieba.Tokenizer()


def cut(text: str) -> list[str]:
    """Returns jieba's tokens in accurate mode."""
    return list(_cutter().cut(text, cut_all=False))

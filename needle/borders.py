"""Where a fact may stand in a text of any script: before a sentence, else before a clause, a word, a character.

Sentences end as most scripts end them, by Unicode's own list of such marks; a full stop of the kind that Latin,
Cyrillic or Greek letters share with abbreviations ends one only before white space and a letter that is no small one.
Text without any (Thai, lists of words, small letters alone, one endless line) still has words or characters, as
people see them (UAX 29), so that there is a border near every place.
"""

from __future__ import annotations

from collections.abc import Sequence

import regex

_CLOSED = r"""[\p{Pe}\p{Pf}\p{Pi}"']*"""  # brackets and quotation marks that belong to what they close
_OPENED = r"""[\p{Ps}\p{Pi}\p{Pf}"']*"""
# A border is where a match ends. Each line is tried where the one before has none close enough.
SENTENCE = regex.compile(
    rf"[\p{{Sentence_Terminal}}…;]{_CLOSED}\s+(?={_OPENED}[\p{{Lu}}\p{{Lt}}\p{{Lo}}])|[。！？｡．]+{_CLOSED}(?=.)"
)
CLAUSE = regex.compile(rf"[\p{{Terminal_Punctuation}}…]{_CLOSED}\s+(?=\S)|[，、；：]{_CLOSED}(?=.)")
SPACE = regex.compile(r"\s+(?=\S)")
WORD = regex.compile(r"(?w)\b(?=\S)")
CHARACTER = regex.compile(r"\X")
LEVELS = (SENTENCE, CLAUSE, SPACE, WORD, CHARACTER)
AROUND = 200  # characters read before and after, so that what a border depends on is seen


def sentences(text: str) -> list[int]:
    """Positions where a sentence begins, 0 among them.

    Example:
        >>> sentences("One. Two? (Three.) Four")
        [0, 5, 10, 19]
    """
    return [0, *(m.end() for m in SENTENCE.finditer(text) if m.end() < len(text))]


def nearest_before(text: str, earliest: int, latest: int, levels: Sequence[regex.Pattern[str]] = LEVELS) -> int:
    """The last border from `earliest` to `latest` (both may be it), of the first kind that has one there.

    The text's beginning is a border of every kind. Where one character takes the whole range, it is the border before.
    """
    start, end = max(0, earliest - AROUND), min(len(text), latest + AROUND)
    for level in levels:
        found = [m.end() for m in level.finditer(text, start, end) if earliest <= m.end() <= latest]
        if found:
            return found[-1]
        if earliest <= 0:
            return 0
    return max((m.end() for m in CHARACTER.finditer(text, start, end) if m.end() <= latest), default=start)

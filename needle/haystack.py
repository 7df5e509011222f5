"""Haystacks: text of an exact number of tokens with facts hidden at given depths, counted by the evaluated tokenizer.

The idea: the filler is cut at a word's end so that the whole prompt, template and question included, fills its target
without ever passing it; each fact goes to the sentence border at or before its target token, or, where that is more
than its tolerance before it, to a clause, a word or a character (borders.py). What was reached is recorded (tokens,
depths, repeats of the filler), never assumed.

Reference: gkamradt/LLMTest_NeedleInAHaystack (depths move back to a full stop, 100 % is the very end) and RULER
(arXiv:2404.06654; white space collapsed, room for the answer counted into the length).
Deviations: gkamradt leaves a fixed buffer of 200 tokens, here the room is max_new_tokens and `reserved_tokens`;
both repeat a short haystack silently, here it is recorded and logged.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

from . import borders

log = logging.getLogger("lm_eval.needle")

PYTHON_HELP = "python_help"
ESSAYS = "essays"
ESSAYS_DATASET = "baber/paul_graham_essays"  # what lm-eval's own RULER reads
MAX_ROUNDS = 12
PIECE = 64  # characters that a tokenizer without offsets is asked about at a time
# How far before the depth asked for a fact may lie, so that it begins a sentence: per cent of the filler's tokens; in
# short prompts as far as a short sentence is long, but never more than half a step of the usual grid.
TOLERANCE, SHORT_SENTENCE_TOKENS, MOST_TOLERANCE = 5.0, 16, 12.5
LONGEST_WORD = 12  # tokens; the filler is cut at a word's end, and inside what is longer
LONGEST_SENTENCE = 2000  # characters; a text with longer ones on average is taken as one without sentences


@dataclass(frozen=True)
class Source:
    """Filler text: its name for the results, and the text with white space collapsed."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Hash of the text: Python's help topics differ between Python versions, folders between users."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@lru_cache(maxsize=4)
def load_source(haystack: str = PYTHON_HELP, folder: str | None = None) -> Source:
    """The filler.

    Args:
        haystack: "python_help" (in every Python installation), "essays" (Paul Graham, from the hub), or the name of a
            hub dataset whose train split has a column "text".
        folder: instead of these, a folder of .txt and .md files, read in the order of their names.

    Raises:
        UserError: the folder holds no such file, or no text; the hub cannot be reached.
    """
    if folder is not None:
        path = Path(folder).expanduser()
        found = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md") and f.is_file())
        if not found:
            raise UserError(
                f"haystack_dir={folder}: no .txt or .md file below {path.resolve()}; give a folder with text, or leave "
                f'it out for Python\'s help topics ("haystack": "{PYTHON_HELP}")'
            )
        return Source(path.name, _some(_collapse("\n".join(map(files.read_text, found))), f"haystack_dir={folder}"))
    if haystack == PYTHON_HELP:
        return Source(PYTHON_HELP, _python_help())
    name = ESSAYS_DATASET if haystack == ESSAYS else haystack
    return Source(haystack, _some(_collapse("\n".join(_of_hub(name))), f"haystack={haystack}"))


def _of_hub(name: str) -> list[str]:
    from datasets import load_dataset

    try:
        rows = list(load_dataset(name, split="train")["text"])
    except Exception as error:  # whatever datasets and the hub raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"haystack: {name} could not be loaded, or its train split has no column `text` ({reason}). Without a "
            f'network, give a folder of text files as haystack_dir, or take "haystack": "{PYTHON_HELP}"'
        ) from error
    for i, text in enumerate(rows):
        files.check(text, str, f"haystack: {name}, row {i}, text")
    return rows


def _some(text: str, setting: str) -> str:
    if not text:
        raise UserError(f"{setting}: its files hold nothing but white space; give some text")
    return text


def _collapse(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _python_help() -> str:
    """The prose of Python's help topics: paragraphs from a capital to a full stop, without grammar and sessions."""
    from pydoc_data.topics import topics

    paragraphs = (p.strip().removeprefix("* ") for key in sorted(topics) for p in topics[key].split("\n\n"))
    prose = (p for p in paragraphs if re.match(r'[A-Z"*]', p) and p.endswith(".") and not re.search("::=|>>>", p))
    return _collapse("\n".join(dict.fromkeys(prose)))  # several topics repeat others' paragraphs: each once


class Counter:
    """Counts tokens as the evaluated model will.

    Args:
        tokenizer: of transformers.
        add_special_tokens: lm-eval's add_bos_token; None for the tokenizer's own habit.
    """

    def __init__(self, tokenizer: Any, add_special_tokens: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self._special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if not self.count("The quick brown fox"):
            raise UserError(f"the tokenizer {tokenizer.name_or_path!r} finds no tokens in plain text: is it empty?")

    def count(self, text: str) -> int:
        """Tokens of a whole prompt, special tokens included."""
        return len(self.tokenizer(text, verbose=False, **self._special).input_ids)

    def starts(self, text: str) -> list[int]:
        """For each token of the text, the position of its first character; close to it without a fast tokenizer."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return [start for start, _ in encoded.offset_mapping]
        found: list[int] = []
        for at in range(0, len(text), PIECE):
            n = len(self.tokenizer(text[at : at + PIECE], add_special_tokens=False, verbose=False).input_ids)
            found += [at + min(PIECE, len(text) - at) * i // n for i in range(n)]
        return found


@dataclass(frozen=True)
class Window:
    """A stretch of filler with what placing facts in it needs; the same for all depths of one length and sample."""

    text: str
    starts: tuple[int, ...]
    repeats: int  # how often the source was begun again because it was used up; 0 is none

    def tokens_of(self, beginning: str) -> int:
        """Tokens of a text that this one begins with."""
        return bisect_right(self.starts, len(beginning) - 1) if beginning else 0

    def cut(self, num_tokens: int) -> str:
        """About the first num_tokens tokens, to the end of a word."""
        if num_tokens <= 0:
            return ""
        if num_tokens >= len(self.starts):
            return self.text
        end, earliest = self.starts[num_tokens], self.starts[max(0, num_tokens - LONGEST_WORD)]
        space = self.text.rfind(" ", earliest, end + 1)
        if space <= 0:
            space = borders.nearest_before(self.text, earliest, end, (borders.WORD, borders.CHARACTER))
        return self.text[:space].rstrip()


def window(source: Source, at: float, num_tokens: int, counter: Counter) -> Window:
    """Filler of at least num_tokens tokens from the sentence at the fraction `at` (0 to 1) of the source on.

    At the source's end it goes on from its beginning. Only a window longer than the source repeats a passage.
    """
    if not source.text:
        raise UserError(f"the haystack {source.name} is empty")
    begins = borders.sentences(source.text)
    if len(source.text) > LONGEST_SENTENCE * len(begins):
        place = int(at * len(source.text))
        begins = [borders.nearest_before(source.text, max(0, place - LONGEST_SENTENCE), place)]
    start = begins[min(int(at * len(begins)), len(begins) - 1)]
    circle = source.text[start:] + (" " + source.text[:start].rstrip() if start else "")
    num_chars, starts, text = 6 * num_tokens + 200, [0], ""
    while len(starts) < num_tokens:
        text = " ".join([circle] * -(-num_chars // (len(circle) + 1)))[:num_chars]
        starts = counter.starts(text)
        num_chars *= 2
    text = text[: starts[num_tokens]] if len(starts) > num_tokens else text
    starts = starts[:num_tokens]
    return Window(text, tuple(starts), (len(text) - 1) // (len(circle) + 1))


@dataclass(frozen=True)
class Hidden:
    """A prompt's context with facts in it, and what was reached."""

    context: str  # the template's head and the filler with its facts; what a question-agnostic method may compress
    length_tokens: int  # of the whole prompt, question included, special tokens included
    depths: tuple[float, ...]  # per cent of the filler's tokens before each fact
    filler_tokens: int  # of the filler alone


def hide(
    window: Window,
    facts: Sequence[str],
    depth_percents: Sequence[float],
    room: int,
    counter: Counter,
    render: Callable[[str], tuple[str, str]],
) -> Hidden:
    """Fills a prompt up to `room` tokens and hides the facts in it.

    Args:
        window: filler of at least `room` tokens.
        facts: sentences; facts at the same place stay in this order.
        depth_percents: for each, 0 (before the filler) to 100 (after it).
        room: most tokens that the prompt may have.
        counter: of the evaluated model's tokenizer.
        render: from the filler with its facts to (context, whole prompt).

    Raises:
        UserError: the template and the facts alone take more than the room.
    """

    def build(num_tokens: int) -> tuple[int, str, tuple[float, ...], int]:
        filler = window.cut(num_tokens)
        text, depths = _insert(filler, window, facts, depth_percents)
        context, prompt = render(text)
        return counter.count(prompt), context, depths, window.tokens_of(filler)

    low, low_built = 0, build(0)
    if low_built[0] > room:
        raise UserError(
            f"a prompt of {room} tokens holds not even its template and facts, which take {low_built[0]}; "
            "raise the length"
        )
    high = len(window.starts) + 1  # the first number of filler tokens known, or assumed, not to fit
    guess = room - low_built[0]
    for _ in range(MAX_ROUNDS):
        guess = min(max(guess, low + 1), high - 1)
        if guess <= low:
            break
        built = build(guess)
        if built[0] <= room:
            low, low_built = guess, built
            if built[0] == room:
                break
        else:
            high = guess
        guess += room - built[0]
    length_tokens, context, depths, filler_tokens = low_built
    return Hidden(context, length_tokens, depths, filler_tokens)


def tolerance(num_tokens: int) -> float:
    """Per cent of a filler of so many tokens that a fact may lie before its depth."""
    return min(max(TOLERANCE, 100 * SHORT_SENTENCE_TOKENS / max(num_tokens, 1)), MOST_TOLERANCE)


def _insert(
    filler: str, window: Window, facts: Sequence[str], depth_percents: Sequence[float]
) -> tuple[str, tuple[float, ...]]:
    """Puts facts into the filler; returns the text and the per cent of filler tokens before each."""
    num_tokens = window.tokens_of(filler)
    places = []
    for percent in depth_percents:
        if percent >= 100 or not filler:
            places.append(len(filler))
        else:
            target = int(num_tokens * percent / 100)
            least = min(target, math.ceil(num_tokens * (percent - tolerance(num_tokens)) / 100))
            earliest = window.starts[least - 1] + 1 if least > 0 else 0  # behind the token that makes it `least`
            places.append(borders.nearest_before(window.text, earliest, max(earliest, window.starts[target])))
    text, last = "", 0
    for place, fact in sorted(zip(places, facts, strict=True), key=lambda pair: pair[0]):
        text += filler[last:place]
        text += " " if text and not text[-1].isspace() else ""
        text += fact
        text += " " if place < len(filler) else ""
        last = place
    before = [window.tokens_of(filler[:place]) for place in places]
    return text + filler[last:], tuple(round(100 * n / max(num_tokens, 1), 2) for n in before)

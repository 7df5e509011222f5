"""Needle episodes: numbers hidden in filler text, and questions about them.

The training script of `kv-tiny` and the quick-start tasks write their prompts with the same few functions, so the
embedded model is asked exactly what it was taught. A statement and its answer share their words ("The special magic
number for falcon is 12345."), so answering is copying from the context: what a compressed KV cache may have lost.

Reference: the wording follows RULER (arXiv:2404.06654, section 3, NIAH) and Kamradt's needle test ("The best thing to
do in San Francisco is ..."); the filler is our own small grammar, so that no text has to be downloaded.
Deviations: RULER writes "One of the special magic numbers for X is: N" and asks in other words, which a model of two
million parameters did not learn to match; its numbers have 7 digits, ours 5 unless asked; our keys are common nouns.

No torch here, and only `random.Random.random()` is drawn from: unlike `choice` or `shuffle`, Python promises the same
sequence of it for a given seed in every version, hence the same episodes everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Form(NamedTuple):
    """The wording of a fact, of the question for it, and of the answer up to its number."""

    statement: str
    question: str
    answer: str


MAGIC = Form(
    "The special magic number for {key} is {value}.",
    "What is the special magic number for {key}?",
    "The special magic number for {key} is",
)
CODE = Form("The secret code of {key} is {value}.", "What is the secret code of {key}?", "The secret code of {key} is")
BEST = Form(
    "The best thing to do in {key} is {value}.",
    "What is the best thing to do in {key}?",
    "The best thing to do in {key} is",
)

KEYS = tuple(
    "falcon river castle garden engine violin pepper candle ladder mirror anchor basket bottle button camera carpet "
    "cherry circle copper cotton desert dragon feather fiddle forest guitar hammer harbor helmet island jacket jungle "
    "kettle lantern lemon magnet marble meadow monkey needle ocean orange oyster palace pencil pillow planet pocket "
    "rabbit ribbon rocket saddle salmon shadow silver spider summer temple thunder tiger timber tunnel turtle valley "
    "velvet walnut whistle willow window winter wizard yellow zebra acorn badger beetle bridge canyon cobalt comet "
    "coral crystal dolphin eagle ember fossil glacier granite hazel honey iris ivory jasmine koala lobster maple "
    "nickel olive opal otter panda parrot pearl pigeon quartz raven sparrow".split()
)

_NAMES = "Anna Ben Clara David Emma Frank Grace Henry Julia Karl Laura Martin Nora Oscar Paula Robert".split()
_PEOPLE = "teacher doctor farmer baker sailor painter child neighbor student writer singer driver guard judge".split()
_THINGS = "letter book chair table cup clock coat map box lamp boat bell door coin flag rope picture knife".split()
_PLACES = "market station village kitchen school library field street church hotel bakery hill shore barn".split()
_ADJECTIVES = "old small quiet bright heavy strange gentle broken green simple cold narrow famous tired".split()
_ACTIONS = "found carried sold painted opened lost repaired moved described bought hid wanted cleaned watched".split()
_MOTIONS = "walked waited worked slept talked sat stood laughed danced rested returned stayed".split()
_ADVERBS = "slowly often quietly again happily early together alone carefully rarely".split()
_TIMES = ("in the morning", "after lunch", "before dark", "every week", "last year", "at night", "on Sunday", "at noon")
_LINKS = "because while although before after until when".split()


class Draw:
    """A seeded stream of choices that is the same in every Python version.

    Args:
        seed: any integer.

    Example:
        >>> Draw(0).pick("abc") == Draw(0).pick("abc")
        True
    """

    def __init__(self, seed: int) -> None:
        self.uniform: Callable[[], float] = random.Random(seed).random

    def below(self, n: int) -> int:
        """Returns an integer in [0, n)."""
        return int(self.uniform() * n)

    def pick(self, items: Sequence[T]) -> T:
        """Returns one of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], n: int) -> list[T]:
        """Returns n different items in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(n)]


@dataclass(frozen=True)
class Needle:
    """One hidden fact: `statement` gives the number `value` of `key`."""

    key: str
    value: str
    statement: str


@dataclass(frozen=True)
class Haystack:
    """Filler with needles woven in, and where each needle went (fraction of the filler before it, 0 to 1)."""

    text: str
    depths: tuple[float, ...]


def _noun_phrase(draw: Draw) -> str:
    kind = draw.below(4)
    if kind == 0:
        return draw.pick(_NAMES)
    article = "the" if draw.below(3) else "a"
    if kind == 1:
        return f"{article} {draw.pick(_ADJECTIVES if article == 'the' else _ADJECTIVES[1:])} {draw.pick(_PEOPLE)}"
    return f"{article} {draw.pick(_PEOPLE)}"


def _clause(draw: Draw) -> str:
    subject = _noun_phrase(draw)
    if draw.below(2):
        end = (f"near the {draw.pick(_PLACES)}", draw.pick(_ADVERBS), draw.pick(_TIMES))[draw.below(3)]
        return f"{subject} {draw.pick(_MOTIONS)} {end}"
    thing = f"the {draw.pick(_ADJECTIVES)} {draw.pick(_THINGS)}" if draw.below(2) else f"the {draw.pick(_THINGS)}"
    end = ("", f" in the {draw.pick(_PLACES)}", f" {draw.pick(_TIMES)}")[draw.below(3)]
    return f"{subject} {draw.pick(_ACTIONS)} {thing}{end}"


def grammar_sentences(draw: Draw) -> Iterator[str]:
    """Yields English sentences without digits or keys, endlessly."""
    while True:
        text = _clause(draw)
        if draw.below(3) == 0:
            text += f" {draw.pick(_LINKS)} {_clause(draw)}"
        yield text[0].upper() + text[1:] + "."


def number(draw: Draw, digits: int, first: str | None = None) -> str:
    """Returns a number as text; `first` fixes its leading digit."""
    lead = first or draw.pick("123456789")
    return lead + "".join(draw.pick("0123456789") for _ in range(digits - 1))


def needles(draw: Draw, n: int, digits: int = 5, keys: Sequence[str] = KEYS, form: Form = MAGIC) -> list[Needle]:
    """Draws needles with different keys, and for n <= 9 different leading digits.

    Different leading digits make the first token of the answer tell the needles apart.

    Args:
        draw: the stream of choices.
        n: number of needles.
        digits: length of each number.
        keys: what the numbers may belong to; at least n of them.
        form: the wording.
    """
    leads: list[str | None] = [*draw.sample("123456789", n)] if n <= 9 else [None] * n
    found = []
    for key, lead in zip(draw.sample(keys, n), leads, strict=True):
        value = number(draw, digits, lead)
        found.append(Needle(key, value, form.statement.format(key=key, value=value)))
    return found


def take(sentences: Iterable[str], length: int, count: Callable[[str], int]) -> list[str]:
    """Takes sentences while they fit into `length`, in units of `count`, which should include what will join them.

    Raises:
        ValueError: not even the first sentence fits.
    """
    taken, used = [], 0
    for sentence in sentences:
        used += count(sentence)
        if used > length:
            break
        taken.append(sentence)
    if not taken:
        raise ValueError(f"length={length} holds not even the first sentence of filler; raise it")
    return taken


def weave(filler: Sequence[str], statements: Sequence[str], depths: Sequence[float]) -> Haystack:
    """Puts statements between sentences of filler.

    Args:
        filler: sentences.
        statements: what to hide.
        depths: for each statement, the fraction of the filler's characters (0 to 1) that should precede it; it goes
            to the sentence border nearest to that.

    Returns:
        The text, sentences joined by spaces, and the depths reached.
    """
    borders = [0]
    for sentence in filler:
        borders.append(borders[-1] + len(sentence) + 1)
    total = max(borders[-1], 1)

    def nearest_border(depth: float) -> int:
        return min(range(len(borders)), key=lambda i: abs(borders[i] - depth * total))

    slots = [nearest_border(depth) for depth in depths]
    parts = []
    for i in range(len(borders)):
        parts += [statement for statement, slot in zip(statements, slots, strict=True) if slot == i]
        parts += filler[i : i + 1]
    return Haystack(" ".join(parts), tuple(borders[slot] / total for slot in slots))


def question(needle: Needle, form: Form = MAGIC) -> str:
    """Returns the question for a needle, ending where the number should follow (" 12345.")."""
    return f"Question: {form.question.format(key=needle.key)}\nAnswer: {form.answer.format(key=needle.key)}"

"""RULER's prompts, written as the official scripts write them: the same draws in the same order from the same seed.

A maker writes a prompt of a given size (needles' haystack, sentences, words or documents). The size is found once, by
steps, with a prompt whose answer is counted too; a sample that comes out longer is written again, a step smaller.

Reference: NVIDIA/RULER, scripts/data/synthetic (niah.py, variable_tracking.py, common_words_extraction.py,
freq_words_extraction.py, qa.py), as of the versions that simonjegou/ruler and lm-eval's `ruler` were made with.
Deviations: a sample that no step makes short enough is an error (official: tries for ever), and the last try is the
smallest prompt there is; a key of the haystack that is asked for is drawn again; newer official versions find the size
by bisection, which fills a few tokens more, and randomise and space their examples in ways of their own.
"""

from __future__ import annotations

import math
import random
import string
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_lm_eval.errors import UserError

REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
VT = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
VT += "Find all variables that are assigned the value {query} in the text above."
VT_ANSWER = (  # the spelling is theirs
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assgined the "
    "value {query}, they are: "
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
_ONLY = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
QA = f"{_ONLY}\n\nThe following are given documents.\n\n{{context}}\n\n{_ONLY}\n\nQuestion: {{query}} Answer:"
DEPTHS = [int(d) for d in np.round(np.linspace(0, 100, num=40, endpoint=True))]
Count = Callable[[str], int]


@dataclass(frozen=True)
class Sample:
    """A whole prompt, beginning of the answer included, and the strings expected in the answer."""

    text: str
    outputs: list[str]


class Maker(ABC):
    """Writes prompts of a size.

    Attributes:
        step: by which sizes differ. most: the largest that can be written; None: any.
        extra_tokens: of what `finished` puts in.
    """

    step: int = 10
    most: int | None = None
    extra_tokens: int = 0

    @property
    def least(self) -> int:
        """The smallest size that can be written."""
        return 1

    @abstractmethod
    def write(self, size: int) -> Sample:
        """A prompt; draws anew each time."""

    def with_answer(self, sample: Sample) -> str:
        """What is counted while the size is looked for."""
        return f"{sample.text} {sample.outputs}"

    def finished(self, sample: Sample) -> Sample:
        """A sample that has been found short enough, as it is given out."""
        return sample


class DoesNotFit(UserError):
    """A length that holds not even the smallest prompt of a task."""


def samples(maker: Maker, length: int, answer_tokens: int, count: Count) -> Iterator[Sample]:
    """Prompts that fit `length` tokens with their answer, without end.

    Raises:
        DoesNotFit: not even the smallest does.
    """
    size = _size(maker, length, answer_tokens, count)
    while True:
        used = size
        while True:
            sample = maker.write(used)
            tokens = count(sample.text) + answer_tokens + maker.extra_tokens
            if tokens <= length:
                break
            if used <= maker.least:
                raise DoesNotFit(
                    f"has prompts that with their answer take {tokens} tokens at least, more than {length}: give "
                    "longer lengths"
                )
            used = max(used - maker.step, maker.least)
        yield maker.finished(sample)


def _size(maker: Maker, length: int, answer_tokens: int, count: Count) -> int:
    size, total = max(maker.step, maker.least), 0
    while total + answer_tokens + maker.extra_tokens < length:
        total = count(maker.with_answer(maker.write(size)))
        if total + answer_tokens + maker.extra_tokens > length:
            size -= maker.step
            break
        size += maker.step
        if maker.most is not None and size > maker.most:
            size = maker.most
            break
    return max(size, maker.least)


# ---------------------------------------------------------------------------------------------- needles


class Niah(Maker):
    """Needles: facts about keys among a repeated sentence, other such facts, or the sentences of a text.

    Args:
        words: adjective-noun pairs. essay: words of a text, for haystack="essay". sentences: splits a text.
    """

    def __init__(
        self,
        rng: random.Random,
        seed: int,
        length: int,
        words: Sequence[str],
        *,
        haystack: str,
        key: str = "words",
        value: str = "numbers",
        keys: int = 1,
        values: int = 1,
        queries: int = 1,
        essay: Sequence[str] = (),
        sentences: Callable[[str], list[str]] | None = None,
    ) -> None:
        self.rng, self.seed, self.words, self.haystack, self.essay = rng, seed, words, haystack, essay
        self.key, self.value, self.values, self.queries = key, value, values, queries
        self.keys = max(keys, queries)
        self.step = 500 if haystack == "essay" else 25 if length >= 4096 else 5
        self.most = len(essay) if haystack == "essay" else None
        self._sentences = sentences

    @property
    def least(self) -> int:
        return self.keys * self.values

    def _draw(self, what: str) -> str:
        if what == "numbers":
            return str(self.rng.randint(10**6, 10**7 - 1))
        if what == "words":
            return self.rng.choice(self.words)
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def write(self, size: int) -> Sample:
        keys: list[str] = []
        values: list[list[str]] = []
        needles: list[str] = []
        for _ in range(self.keys):
            keys.append(self._draw(self.key))
            values.append([])
            for _ in range(self.values):
                values[-1].append(self._draw(self.value))
                needles.append(NEEDLE.format(kind=self.value, key=keys[-1], value=values[-1][-1]))
        random.Random(self.seed).shuffle(needles)
        context = self._in_essay(size, needles) if self.haystack == "essay" else self._in_lines(size, needles, keys)
        chosen = self.rng.sample(range(self.keys), self.queries)
        asked = [keys[i] for i in chosen]
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        template, kind = NIAH, self.value
        if self.queries * self.values == 1:
            for many, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
                template = template.replace(many, one)
            kind = kind[:-1]
        return Sample(template.format(kind=kind, context=context, query=query), [v for i in chosen for v in values[i]])

    def _in_essay(self, size: int, needles: list[str]) -> str:
        assert self._sentences is not None
        text = self._sentences(" ".join(self.essay[:size]).strip())
        places = sorted(int(len(text) * (depth / 100)) for depth in self.rng.sample(DEPTHS, len(needles)))
        parts, last = [], 0
        for place, needle in zip(places, needles, strict=True):
            parts += [" ".join(text[last:place]), needle]
            last = place
        return " ".join([*parts, " ".join(text[last:])])

    def _in_lines(self, size: int, needles: list[str], keys: list[str]) -> str:
        lines = [REPEATED] * size if self.haystack == "repeat" else [self._distractor(keys) for _ in range(size)]
        places = sorted(self.rng.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _distractor(self, keys: list[str]) -> str:
        key = self._draw(self.key)
        while key in keys:
            key = self._draw(self.key)
        return NEEDLE.format(kind=self.value, key=key, value=self._draw(self.value))

    def with_answer(self, sample: Sample) -> str:
        return sample.text + " ".join(sample.outputs)


# ---------------------------------------------------------------------------------------------- variables


class Variables(Maker):
    """Variable tracking: a chain of assignments among repeated sentences, after a short worked example.

    Args:
        numbers: of the values. example: whether this writes the example itself, with shorter names and none before it.
    """

    hops = 4

    def __init__(
        self,
        rng: random.Random,
        numbers: np.random.RandomState,
        count: Count,
        answer_tokens: int,
        example: bool = False,
    ) -> None:
        self.rng, self.numbers, self.letters = rng, numbers, 3 if example else 5
        self.step, self.extra_tokens, self._example = 5 if example else 10, 0, ""
        if not example:
            one = next(samples(Variables(rng, numbers, count, answer_tokens, True), 500, answer_tokens, count))
            self._example = f"{one.text} {' '.join(one.outputs)}\n\n"
            self.extra_tokens = count(self._example)

    def _names(self) -> list[str]:
        def name() -> str:
            return "".join(self.rng.choices(string.ascii_uppercase, k=self.letters))

        names = [name() for _ in range(self.hops + 1)]
        while len(set(names)) < self.hops + 1:
            names.append(name())
        return names[: self.hops + 1]

    def write(self, size: int) -> Sample:
        names = self._names()
        value = str(self.numbers.randint(10000, 99999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:], strict=False)]
        lines = [REPEATED + "\n"] * size
        if len(lines) <= len(chain):
            pieces = [piece for line in lines for piece in line.split(".")]
            lines = [piece + "." if piece.strip() else piece for piece in pieces]
            chain = chain[: max(len(lines) - 1, 0)] if len(lines) <= len(chain) else chain
        for i, place in enumerate(sorted(self.rng.sample(range(len(lines)), len(chain)))):
            lines.insert(place + i, chain[i])
        context = " ".join(lines).replace(". \n", ".\n")
        return Sample((VT + VT_ANSWER).format(context=context, query=value, num_v=self.hops + 1), names)

    def finished(self, sample: Sample) -> Sample:
        return Sample(self._other_names() + "\n\n" + sample.text, sample.outputs) if self._example else sample

    def _other_names(self) -> str:
        """The example with names of its own for each sample."""
        end = VT_ANSWER[-10:]
        text = self._example
        for name in text[text.index(end) + len(end) :].split():
            text = text.replace(name, "".join(self.rng.choices(string.ascii_uppercase, k=len(name))))
        return text


# ---------------------------------------------------------------------------------------------- words


class CommonWords(Maker):
    """cwe: ten words that come often in a numbered list, after a shorter such list with its answer."""

    common = 10

    @property
    def least(self) -> int:
        return self.common

    def __init__(self, rng: random.Random, seed: int, length: int, words: Sequence[str]) -> None:
        self.rng, self.seed, self.words, self.most = rng, seed, list(words), len(words)
        random.Random(seed).shuffle(self.words)
        self._example, self._often, self._seldom = ((20, 3, 1), 6, 1) if length < 4096 else ((40, 10, 3), 30, 3)

    def _list(self, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
        drawn = self.rng.sample(self.words, size)
        words = drawn[: self.common] * often + drawn[self.common :] * seldom
        random.Random(self.seed).shuffle(words)
        return _numbered(words), drawn[: self.common]

    def write(self, size: int) -> Sample:
        example, example_answer = self._list(*self._example)
        context, answer = self._list(size, self._often, self._seldom)
        head = CWE.format(context=example) + _numbered(example_answer)
        return Sample(f"{head}\n{CWE.format(context=context)}", answer)

    def with_answer(self, sample: Sample) -> str:
        return f"{sample.text} {_numbered(sample.outputs)}"


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def frequent_words(rng: random.Random, seed: int, length: int, count: Count) -> Iterator[Sample]:
    """fwe: the three most frequent of coded words whose numbers fall with the square of their rank; the first is dots.

    As officially, `length` is the prompt's own: the answer comes on top.
    """
    vocabulary, step = length // 50, length // 32
    if vocabulary < 4 or step < 1:
        raise DoesNotFit(f"has three coded words, for which {length} tokens are too few: give lengths of 200 or more")

    def words() -> list[str]:
        def word() -> str:
            return "".join(rng.choices(string.ascii_lowercase, k=6))

        drawn = [word() for _ in range(vocabulary)]
        while len(set(drawn)) < vocabulary:
            drawn.append(word())
        drawn = sorted(set(drawn))
        random.Random(seed).shuffle(drawn)
        return ["...", *drawn[1:]]

    def text(of: list[str], size: int) -> str:
        ranks = np.arange(1, len(of) + 1)
        counts = (size * (ranks**-2.0) / (math.pi**2 / 6)).astype(int).tolist()
        listed = [word for word, n in zip(of, counts, strict=True) for _ in range(n)]
        random.Random(seed).shuffle(listed)
        return FWE.format(context=" ".join(listed))

    of, size = words(), length // 6
    while count(text(of, size)) < length:
        size += step
    size -= step
    while True:
        of, used = words(), size
        while count(text(of, used)) > length:
            used -= step
            if used <= 0:
                raise DoesNotFit(f"has a prompt that {length} tokens do not hold: give longer lengths")
        yield Sample(text(of, used), of[1:4])


# ---------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Questions:
    """Questions about documents.

    Attributes:
        asked: question, answers, documents that hold the answer, and others of the same source, each.
    """

    documents: list[str]
    asked: list[tuple[str, list[str], list[int], list[int]]]


class Documents(Maker):
    """qa: the question's own documents among others; the n-th sample asks the n-th question."""

    def __init__(self, rng: random.Random, seed: int, questions: Questions) -> None:
        self.rng, self.seed, self.questions, self._at = rng, seed, questions, 0
        self.most = len(questions.documents)

    @property
    def least(self) -> int:
        return len(self.questions.asked[self._at][2])

    def write(self, size: int) -> Sample:
        question, answers, own, near = self.questions.asked[self._at]
        documents = self.questions.documents
        if size >= len(documents):
            chosen = list(documents)
        else:
            if size - len(own) > len(near):
                known = {*own, *near}
                others = [i for i in range(len(documents)) if i not in known]
                numbers = own + near + self.rng.sample(others, max(0, size - len(own) - len(near)))
            else:
                numbers = own + self.rng.sample(near, max(0, size - len(own)))
            chosen = [documents[i] for i in numbers]
        random.Random(self.seed).shuffle(chosen)
        context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(chosen, 1))
        return Sample(QA.format(context=context, query=question), list(answers))

    def finished(self, sample: Sample) -> Sample:
        self._at = min(self._at + 1, len(self.questions.asked) - 1)
        return sample


def questions_of_squad(data: Mapping[str, Any]) -> Questions:
    """Of SQuAD 2.0's file; questions without an answer are left out."""
    paragraphs = [paragraph for article in data["data"] for paragraph in article["paragraphs"]]
    documents = sorted({paragraph["context"] for paragraph in paragraphs})
    place = {document: i for i, document in enumerate(documents)}
    asked: list[tuple[str, list[str], list[int], list[int]]] = []
    for article in data["data"]:
        all_of_it = [place[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = place[paragraph["context"]]
            for one in paragraph["qas"]:
                if not one["is_impossible"]:
                    answers = [answer["text"] for answer in one["answers"]]
                    asked.append((one["question"], answers, [own], [i for i in all_of_it if i != own]))
    return Questions(documents, asked)


def questions_of_hotpotqa(data: Sequence[Mapping[str, Any]]) -> Questions:
    """Of HotpotQA's distractor file."""
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in one["context"]] for one in data]
    documents = sorted({text for of_one in texts for text in of_one})
    place = {document: i for i, document in enumerate(documents)}
    asked: list[tuple[str, list[str], list[int], list[int]]] = [
        (one["question"], [one["answer"]], [place[text] for text in of_one], [])
        for one, of_one in zip(data, texts, strict=True)
    ]
    return Questions(documents, asked)

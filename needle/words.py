"""Lists of words in which some come often: RULER's common words (cwe) and frequent words (fwe); no depth.

Counting needs the whole context, so these break before a single needle does.

Reference: RULER (arXiv:2404.06654; NVIDIA/RULER scripts/data/synthetic/common_words_extraction.py and
freq_words_extraction.py: wordings, counts, tokens to generate).
Deviations: words come from Python's help topics (RULER: a package of English words), then coined ones; no worked
example before the question; as many words as fit are found by bisection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from kv_lm_eval.errors import UserError
from kv_lm_eval.tiny.episodes import Draw

from .haystack import Source, load_source
from .tasks import SEVERAL, different, labels, prompt_room, seeded, setup


def _most(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest n in [low, high) that fits, if low does and what is smaller than a fitting one fits."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _shuffled(draw: Draw, items: list[str]) -> list[str]:
    return [item for _, item in sorted((draw.uniform(), item) for item in items)]


def _coded(draw: Draw) -> str:
    return "".join(draw.pick("abcdefghijklmnopqrstuvwxyz") for _ in range(6))


def _counting(
    name: str,
    max_new_tokens: int,
    metadata: Mapping[str, Any],
    ask: Callable[[int, int, Source], tuple[Callable[[int], tuple[str, list[str]]], int]],
    words: tuple[str, str, str],
) -> dict[str, Dataset]:
    """Tasks whose context is a list of words: as many as fit the length. They have no depth.

    Args:
        ask: from (length, seed, source of words) to (n -> (list of words as text, expected words), smallest n).
        words: what stands before the list, the question, the beginning of the answer.
    """
    settings, counter = setup(metadata)
    head, question, gen_prefix = words
    source = load_source()
    rows = []
    for length in settings.lengths:
        room = prompt_room(length, max_new_tokens, settings)
        for sample in range(settings.samples_per_cell):
            write, least = ask(length, seeded(name, settings.needle_seed, length, sample).below(2**40), source)

            def tokens(n: int) -> int:
                return counter.count(head + write(n)[0] + f"\n{question} {gen_prefix}")  # noqa: B023

            if tokens(least) > room:
                raise UserError(f"{name}: {length} tokens hold too few words for an answer; raise the length")
            n = _most(lambda n: tokens(n) <= room, least, room + 1)  # noqa: B023
            text, expected = write(n)
            rows.append(
                {
                    "context": head + text + "\n",
                    "question": question,
                    "gen_prefix": gen_prefix,
                    "expected": expected,
                    "reference": " ".join(expected),
                    "rouge_reference": " ".join(expected),
                    "length_tokens": tokens(n),
                    "needle_ids": [f"word:{word}" for word in expected],
                    "filler_tokens": 0,
                    "asked_depth_percents": [],
                    "needle_depth_percents": [],
                    "needle_removed": False,
                    "context_length": length,
                    "document_depth_percent": None,
                    "sample": sample,
                    "needle_seed": settings.needle_seed,
                    "haystack": "",
                    "haystack_sha256": source.sha256 if name == "kv_needle_cwe" else "",
                    "haystack_repeats": 0,
                    **labels(SEVERAL, length, None),
                }
            )
    return {"test": Dataset.from_list(rows)}


def _common_words(length: int, seed: int, source: Source) -> tuple[Callable[[int], tuple[str, list[str]]], int]:
    """RULER's cwe: ten words 30 times each (6 below 4,096 tokens) among n that come 3 times (once)."""
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    draw = Draw(seed)
    pool = _shuffled(draw, sorted(set(re.findall(r"\b[a-z]{4,10}\b", source.text))))
    pool += different(_coded, draw, max(0, length - len(pool)))
    common = [w for w in pool[:200] if not any(w in other and w != other for other in pool)][:10]
    rest = [w for w in pool if w not in common]

    def write(n: int) -> tuple[str, list[str]]:
        words = _shuffled(Draw(seed + 1), common * often + rest[:n] * seldom)
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1)), common

    return write, 1


def _frequent_words(length: int, seed: int, source: Source) -> tuple[Callable[[int], tuple[str, list[str]]], int]:
    """RULER's fwe: coded words whose numbers fall with the square of their rank; the first rank is dots."""
    vocabulary = ["...", *different(_coded, Draw(seed), max(length // 50, 10))]

    def write(n: int) -> tuple[str, list[str]]:
        counts = [int(n * rank**-2 * 6 / math.pi**2) for rank in range(1, len(vocabulary) + 1)]
        counts[4:] = [min(c, counts[3] - 1) for c in counts[4:]]  # what is no answer comes less often than the third
        words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        return " ".join(_shuffled(Draw(seed + 1), words)), vocabulary[1:4]

    return write, 28


def cwe(**metadata: Any) -> dict[str, Dataset]:
    """kv_needle_cwe: the ten common words of a list."""
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    question = "Question: What are the 10 most common words in the above list?"
    answer = "Answer: The top 10 words that appear most often in the list are:"
    return _counting("kv_needle_cwe", 120, metadata, _common_words, (head, question, answer))


def fwe(**metadata: Any) -> dict[str, Dataset]:
    """kv_needle_fwe: the three most frequent coded words."""
    head = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    question = (
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    answer = "Answer: According to the coded text above, the three most frequently appeared words are:"
    return _counting("kv_needle_fwe", 50, metadata, _frequent_words, (head, question, answer))

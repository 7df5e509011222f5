"""Scores by rule, per document and per cell of the grid; no judge model.

`process` is every needle task's process_results, `mean` and `grid` its aggregations. Each answer gives its named
scores and one entry of "cells", whose aggregate is the grid itself: it stands in lm-eval's results file, so that a
heat-map needs no --log_samples.

Reference: RULER's string_match_all and string_match_part (NVIDIA/RULER, scripts/eval/synthetic/constants.py); the word
recall that KVCache-Factory's heat-map recomputes from the answers; rouge_score for ROUGE-1 (with stemmer, as there).
Deviations: none in these; content words and `exact` are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from statistics import fmean
from typing import Any

# The English function words of a sentence like the classic needle: a random answer gets a fifth of recall from them.
STOP_WORDS = frozenset(
    """a about after all also an and any are as at be because been before but by can could did do does for from had has
    have he her his how i if in into is it its just more most my no not of on one only or other our out over she so some
    than that the their them then there these they this to up was we were what when where which who will with would you
    your""".split()
)


def contains(answer: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that occur in the answer, case ignored (RULER: string_match_all)."""
    return fmean(_clean(e) in _clean(answer) for e in expected)


def contains_any(answer: str, expected: Sequence[str]) -> float:
    """1 if any of the expected strings occurs (RULER: string_match_part)."""
    return float(any(_clean(e) in _clean(answer) for e in expected))


def contains_every(answer: str, expected: Sequence[str]) -> float:
    """1 if all of the expected strings occur."""
    return float(all(_clean(e) in _clean(answer) for e in expected))


def exact(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer is one of the expected strings: case, and white space and .,:;!?'" around it, are ignored."""
    return float(_bare(answer) in map(_bare, expected))


def recall_words(answer: str, reference: str) -> float:
    """Share of the reference's different words that occur in the answer; split at white space, case ignored."""
    wanted = set(reference.lower().split())
    return len(wanted & set(answer.lower().split())) / len(wanted)


def recall_content_words(answer: str, reference: str) -> float:
    """recall_words without English function words and punctuation, so that an answer of "a", "and", "in" is 0.

    A reference of function words alone is taken as it is.
    """
    words = set(_words(reference))
    wanted = words - STOP_WORDS or words
    return len(wanted & set(_words(answer))) / len(wanted)


def rouge1_recall(answer: str, reference: str) -> float:
    """ROUGE-1 recall against the reference, words stemmed."""
    return float(_rouge().score(reference, answer)["rouge1"].recall)


def rouge1_f(answer: str, reference: str) -> float:
    """ROUGE-1 F measure, words stemmed: punishes long answers, which recall does not."""
    return float(_rouge().score(reference, answer)["rouge1"].fmeasure)


def _clean(text: str) -> str:
    """RULER's clean-up of predictions: control characters are line breaks, the ends are bare; and lower case."""
    return re.sub(r"[\x00-\x1f]", "\n", text).strip().lower()


def _bare(text: str) -> str:
    return text.strip(" \t\r\n.,:;!?'\"").lower()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=True)


# Every score from 0 to 1; a document names those it is given, the main one first.
SCORES: dict[str, Callable[[str, dict[str, Any]], float]] = {
    "contains": lambda answer, doc: contains(answer, doc["expected"]),
    "contains_any": lambda answer, doc: contains_any(answer, doc["expected"]),
    "contains_every": lambda answer, doc: contains_every(answer, doc["expected"]),
    "exact": lambda answer, doc: exact(answer, doc["expected"]),
    "recall_words": lambda answer, doc: recall_words(answer, doc["reference"]),
    "recall_content_words": lambda answer, doc: recall_content_words(answer, doc["reference"]),
    "rouge1_recall": lambda answer, doc: rouge1_recall(answer, doc["rouge_reference"]),
    "rouge1_f": lambda answer, doc: rouge1_f(answer, doc["rouge_reference"]),
}


# ---------------------------------------------------------------------------------------------- lm-eval's functions


def process(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """process_results: the scores of one answer, and its entry for the grid.

    An answer to a prompt without its needle counts for `floor` alone; an answer that ran out of memory counts for
    nothing but its cell.
    """
    from kv_lm_eval.errors import OUT_OF_MEMORY

    (answer,) = results
    failed = "OOM" if answer == OUT_OF_MEMORY else None
    primary = doc["scores"][0]
    found = {} if failed else {name: SCORES[name](answer, doc) for name in doc["scores"]}
    cell = {
        "context_length": doc["context_length"],
        "document_depth_percent": doc["document_depth_percent"],
        "length_tokens": doc["length_tokens"],
        "needle_depth_percent": next(iter(doc.get("needle_depth_percents") or ()), None),
        "needle_removed": doc["needle_removed"],
        "primary": primary,
        "failed": failed,
        "scores": found,
    }
    if failed:
        return {"cells": cell}
    if doc["needle_removed"]:
        return {"floor": found[primary], "cells": cell}
    return {**found, "cells": cell}


class Grid(tuple[dict[str, Any], ...]):
    """The cells of a grid: a list in the results file, and short in lm-eval's table."""

    def __str__(self) -> str:
        return f"{len(self)} cells"

    __repr__ = __str__


def grid(answers: Iterable[dict[str, Any]]) -> Grid:
    """Aggregation of "cells": the mean of each score in each cell, the number of answers, failures apart.

    Returns:
        one dict a cell, by length and then by depth: context_length, document_depth_percent (None where a task has no
        depth), samples, length_tokens (mean), needle_depth_percent (mean of what the first fact reached, None
        without depth), primary, scores, floor (None unless asked for), failed (how many of what kind).
    """
    by_place: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for answer in answers:
        depth = answer["document_depth_percent"]
        by_place.setdefault((answer["context_length"], -1.0 if depth is None else depth), []).append(answer)
    return Grid(_cell(group) for _, group in sorted(by_place.items()))


def _cell(group: list[dict[str, Any]]) -> dict[str, Any]:
    primary = group[0]["primary"]
    scored = [a["scores"] for a in group if not a["failed"] and not a["needle_removed"]]
    floor = [a["scores"][primary] for a in group if not a["failed"] and a["needle_removed"]]
    failures = [a["failed"] for a in group if a["failed"] and not a["needle_removed"]]
    reached = [d for a in group if (d := a.get("needle_depth_percent")) is not None]
    return {
        "context_length": group[0]["context_length"],
        "document_depth_percent": group[0]["document_depth_percent"],
        "samples": len(scored),
        "length_tokens": round(fmean(a["length_tokens"] for a in group), 1),
        "needle_depth_percent": round(fmean(reached), 2) if reached else None,
        "primary": primary,
        "scores": {name: fmean(s[name] for s in scored) for name in scored[0]} if scored else {},
        "floor": fmean(floor) if floor else None,
        "failed": {kind: failures.count(kind) for kind in sorted(set(failures))},
    }

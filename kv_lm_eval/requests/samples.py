"""What is known of a request, sizes and times, travels with its answer into the samples, under `efficiency`.

lm-eval hands answers on as they are, from the model through the ranks to the samples, so that they are the one place
where a number cannot be taken for another request's. An answer is what lm-eval wants, a text, a pair or a number,
with one attribute more. The one function that makes an evaluation is wrapped: it marks where one ends and the next
begins, and gives the samples their field.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from kv_lm_eval.requests.document_scores import DocumentScore

FROM_CACHE = {"from_request_cache": True}
NO_MEMORY = {"out_of_memory": True}


class Text(str):
    """The answer of generate_until. lm-eval makes others of its type, of the targets."""

    efficiency: dict[str, Any] | None

    def __new__(cls, text: Any = "", efficiency: dict[str, Any] | None = None) -> Text:
        self = super().__new__(cls, text)
        self.efficiency = efficiency
        return self

    def __reduce__(self) -> Any:
        return Text, (str(self), self.efficiency)


class Choice(tuple[float, bool]):
    """The answer of loglikelihood. Choices that share a context share its numbers."""

    efficiency: dict[str, Any] | None

    def __new__(cls, score: tuple[float, bool], efficiency: dict[str, Any] | None = None) -> Choice:
        self = super().__new__(cls, score)
        self.efficiency = efficiency
        return self

    def __reduce__(self) -> Any:
        return Choice, (tuple(self), self.efficiency)


def from_cache(answer: Any) -> Any:
    """An answer that lm-eval's --use_cache had: it says so, and has no numbers."""
    if isinstance(answer, str):
        return Text(answer, FROM_CACHE)
    if isinstance(answer, tuple):
        return Choice(answer, FROM_CACHE)
    if isinstance(answer, DocumentScore):
        answer.efficiency = FROM_CACHE
    return answer


def mark_what_is_read(dbdict: Any) -> None:
    """Answers in lm-eval's SqliteDict are written bare, and marked when they are read."""
    encode, decode = dbdict.encode, dbdict.decode
    dbdict.encode = lambda answer: encode(_bare(answer))
    dbdict.decode = lambda stored: from_cache(decode(stored))


def _bare(answer: Any) -> Any:
    if isinstance(answer, Text):
        return str(answer)
    if isinstance(answer, Choice):
        return tuple(answer)
    return answer.bare() if isinstance(answer, DocumentScore) else answer


def entries(arguments: list[tuple[Any, ...]], answers: list[list[Any]]) -> list[dict[str, Any]]:
    """A sample's field: one entry a distinct prompt, in order; none for answers that are not ours.

    Args:
        arguments, answers: of each request of the sample; of repeats the first counts.
    """
    found: dict[Any, dict[str, Any]] = {}
    for args, repeats in zip(arguments, answers, strict=True):
        known = getattr(repeats[0], "efficiency", None) if repeats else None
        if known is not None:
            found.setdefault(args[0] if known in (FROM_CACHE, NO_MEMORY) else id(known), known)
    return list(found.values())


def install() -> None:
    """Wraps lm-eval's `evaluate`, to which its command line and `simple_evaluate` lead; once is enough."""
    from lm_eval import evaluator

    original = evaluator.evaluate
    if hasattr(original, "wrapped_by_kv_lm_eval"):
        return

    @functools.wraps(original)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        around = getattr(kwargs["lm"] if "lm" in kwargs else args[0], "evaluation", nullcontext)
        with around():
            results = original(*args, **kwargs)
        samples = results.get("samples") if isinstance(results, Mapping) else None
        for sample in (s for of_task in (samples or {}).values() for s in of_task):
            if known := entries(sample["arguments"], sample["resps"]):
                sample["efficiency"] = known
        return results

    evaluate.wrapped_by_kv_lm_eval = True  # type: ignore[attr-defined]
    evaluator.evaluate = evaluate

"""What is known of a request, sizes and times, travels with its answer into the samples, under `efficiency`.

lm-eval hands answers on as they are, from the model through the ranks to the samples, so that they are the one place
where a number cannot be taken for another request's. An answer is what lm-eval wants, a text, a pair or a number,
with one attribute more. The one function that makes an evaluation is wrapped: it marks where one ends and the next
begins, and gives the samples their field.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from kv_lm_eval.requests import verdicts
from kv_lm_eval.requests.beside import Beside
from kv_lm_eval.requests.document_scores import DocumentScore

FROM_CACHE = {"from_request_cache": True}
NO_MEMORY = {"out_of_memory": True}


class Text(str):
    """The answer of generate_until. lm-eval makes others of its type, of the targets."""

    efficiency: dict[str, Any] | None
    beside: Beside | None  # against the full cache, with fidelity=True
    tokens: tuple[int, ...]  # as they were generated, the stop included; not known of an answer from a cache

    def __new__(
        cls,
        text: Any = "",
        efficiency: dict[str, Any] | None = None,
        beside: Beside | None = None,
        tokens: Sequence[int] = (),
    ) -> Text:
        self = super().__new__(cls, text)
        self.efficiency, self.beside, self.tokens = efficiency, beside, tuple(tokens)
        return self

    def __reduce__(self) -> Any:
        return Text, (str(self), self.efficiency, self.beside, self.tokens)


class Choice(tuple[float, bool]):
    """The answer of loglikelihood. Choices that share a context share its numbers."""

    efficiency: dict[str, Any] | None
    beside: Beside | None

    def __new__(
        cls, score: tuple[float, bool], efficiency: dict[str, Any] | None = None, beside: Beside | None = None
    ) -> Choice:
        self = super().__new__(cls, score)
        self.efficiency, self.beside = efficiency, beside
        return self

    def __reduce__(self) -> Any:
        return Choice, (tuple(self), self.efficiency, self.beside)


def from_cache(answer: Any) -> Any:
    """An answer that lm-eval's --use_cache had: it says so, and has no numbers."""
    beside = getattr(answer, "beside", None)
    if isinstance(answer, str):
        return Text(answer, FROM_CACHE, beside)
    if isinstance(answer, tuple):
        return Choice(answer, FROM_CACHE, beside)
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
        return str(answer) if answer.beside is None else Text(answer, beside=answer.beside)
    if isinstance(answer, Choice):
        return tuple(answer) if answer.beside is None else Choice(answer, beside=answer.beside)
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
        lm, tasks = kwargs["lm"] if "lm" in kwargs else args[0], kwargs.get("task_dict", (*args[1:2], None)[0])
        with getattr(lm, "evaluation", nullcontext)():
            results = original(*args, **kwargs)
        verdicts.add(lm, tasks, results)
        samples = results.get("samples") if isinstance(results, Mapping) else None
        for sample in (s for of_task in (samples or {}).values() for s in of_task):
            if known := entries(sample["arguments"], sample["resps"]):
                sample["efficiency"] = known
            if compared := verdicts.of_sample(sample["resps"]):
                sample["fidelity"] = compared
        return results

    evaluate.wrapped_by_kv_lm_eval = True  # type: ignore[attr-defined]
    evaluator.evaluate = evaluate

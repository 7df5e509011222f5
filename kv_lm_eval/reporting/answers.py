"""lm-eval's samples files: the answers to single documents, believed only if the file is whole and of its run."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_lm_eval import files
from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import schemas
from kv_lm_eval.reporting.run import Run, is_number
from kv_lm_eval.stats.clusters import Texts, texts_of

BLOCK = 32  # tokens; put together to longer ones where they are compared


@dataclass(frozen=True)
class Sample:
    """One answer to one document, cut to what a report shows."""

    doc_id: int
    filter: str
    prompt_hash: str
    prompt_end: str
    prompt_chars: int
    target: str
    answer: str
    detail: str  # log-likelihoods of the choices, the text before the filter
    metrics: dict[str, Any]
    place: tuple[int, float] | None  # context_length, document_depth_percent of a needle
    blocks: tuple[tuple[float, int], ...] = ()  # (log-likelihood, tokens) of each BLOCK tokens, where they are recorded
    texts: Texts = Texts()  # what it is about, by which documents belong together
    view: dict[str, Any] | None = None  # token by token against the full cache (requests/likeliest.py)


SampleKey = tuple[str, int]  # hash of the document, and which of its copies


def read(run: Run, task: str, prompt_chars: int = 700, answer_chars: int = 1500) -> dict[str, dict[SampleKey, Sample]]:
    """A run's answers to a task, by filter and then by document; {} where they were not logged.

    Args:
        prompt_chars: prompts are cut to their end.
        answer_chars: answers are cut to their beginning.

    Raises:
        UserError: the file is missing, cut, not what lm-eval writes, or of another run.
    """
    file = run.samples_file(task)
    if file is None:
        return {}
    found: dict[str, dict[SampleKey, Sample]] = {}
    copies: Counter[tuple[str, str]] = Counter()
    hashes = hashlib.sha256()
    of_documents: dict[bool, str] = {}  # whether one is what was hashed -> where
    for place, record in _lines(file):
        of_documents.setdefault(_is_hashed(record["doc"], record["doc_hash"]), place)
        sample = _sample(record, place, prompt_chars, answer_chars)
        document = (sample.filter, record["doc_hash"])
        found.setdefault(sample.filter, {})[record["doc_hash"], copies[document]] = sample
        copies[document] += 1
        hashes.update((record["doc_hash"] + record["prompt_hash"] + record["target_hash"]).encode(errors="replace"))
    if len(of_documents) > 1:  # a task may change all of its documents while it scores them
        raise UserError(f"{of_documents[False]}: its document is not the one of doc_hash, as other documents are")
    _check_whole(run, task, file, found, hashes.hexdigest())
    return found


def _is_hashed(doc: Any, digest: str) -> bool:
    """Whether a document is the one that lm-eval hashed."""
    text = json.dumps(doc, indent=2, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest() == digest


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise UserError(f"{file}: is no regular file")
    for number, record in files.read_jsonl(file):
        place = f"{file}, line {number}"
        files.check(record, schemas.Answer, place)
        if lacking := [name for name in record["metrics"] if name not in record]:
            raise UserError(f"{place}: names a score {lacking[0]!r} and does not have it")
        yield place, record


def _check_whole(run: Run, task: str, file: Path, found: dict[str, dict[SampleKey, Sample]], hashes: str) -> None:
    """Against what the results file says of the answers that it was made of."""
    asked = run.documents(task)
    if asked and not found:
        raise UserError(f"{file}: is empty, {asked} answers were expected")
    for filter_, of_filter in found.items():
        scored = Counter(name for sample in of_filter.values() for name in sample.metrics)
        if asked is not None and asked not in (len(of_filter), max(scored.values(), default=0)):
            raise UserError(f"{file}: holds {len(of_filter)} answers of {asked} ({filter_})")
        _check_alike(file, list(of_filter.values()))
    expected = (run.results.get("task_hashes") or {}).get(task)
    if expected is not None and expected != hashes:
        raise UserError(f"{file}: is not what {run.results_file} was made of (lines are missing, doubled or changed)")
    for filter_, of_filter in found.items():
        for metric in {name for sample in of_filter.values() for name in sample.metrics}:
            if f"{metric},{filter_}" not in run.tasks[task]:
                raise UserError(f"{file}: has a score {metric} ({filter_}) that {run.results_file} does not have")


def _check_alike(file: Path, of_filter: list[Sample]) -> None:
    """All documents of a task have scores of one kind, and all have a place or tokens or none has."""
    kinds: dict[str, set[str]] = {}
    for sample in of_filter:
        for name, value in sample.metrics.items():
            kinds.setdefault(name, set()).add(_kind(value))
        kinds.setdefault("places in the text", set()).add(str(sample.place is not None))
        kinds.setdefault("tokens", set()).add(str(bool(sample.blocks)))
    for name, different in kinds.items():
        if len(different) > 1:
            raise UserError(f"{file}: {name} are of different kinds: {', '.join(sorted(different))}")


def _kind(value: Any) -> str:
    if isinstance(value, (bool, int, float)):
        return "number"
    return f"list of {len(value)}" if isinstance(value, list) else type(value).__name__


def _sample(record: dict[str, Any], place: str, prompt_chars: int, answer_chars: int) -> Sample:
    calls = list(record["arguments"].values())
    prompt = str(calls[0].get("arg_0", "")) if calls else ""
    doc = record["doc"] if isinstance(record["doc"], dict) else {}
    try:
        answer, detail = _answer(record, calls)
        blocks = _blocks(doc)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {error}") from None
    view = next((v for part in _compared(record, doc) if (v := part.get("view")) is not None), None)
    if view is not None:
        files.check(view, schemas.View, f"{place}, view")
    metrics = {name: record[name] for name in record["metrics"]}
    if blocks and not any(adds_up(blocks, value) for value in metrics.values()):
        raise UserError(f"{place}: doc.per_token.nll does not add up to any of its scores")
    where = (doc.get("context_length"), doc.get("document_depth_percent"))
    return Sample(
        doc_id=record["doc_id"],
        filter=record["filter"],
        prompt_hash=record["prompt_hash"],
        prompt_end=prompt[-prompt_chars:],
        prompt_chars=len(prompt),
        target=str(record["target"])[:answer_chars],
        answer=answer[:answer_chars],
        detail=detail[:answer_chars],
        metrics=metrics,
        place=where if all(is_number(part) for part in where) else None,  # type: ignore[arg-type]
        blocks=blocks,
        texts=texts_of(doc, record["doc_hash"]),
        view=view,
    )


def _compared(record: dict[str, Any], doc: dict[str, Any]) -> list[dict[str, Any]]:
    """What stands in a sample of its comparison with the full cache."""
    found = record.get("fidelity")
    parts = [*(found if isinstance(found, list) else ()), doc.get("per_token")]
    return [part for part in parts if isinstance(part, dict)]


def _blocks(doc: dict[str, Any]) -> tuple[tuple[float, int], ...]:
    """Short stretches of neighbouring tokens, of which longer ones can be made (stats/blocks.py)."""
    per_token = doc.get("per_token")
    nll = per_token.get("nll") if isinstance(per_token, dict) else None
    if not isinstance(nll, list):
        return ()
    parts = [[v for v in nll[i : i + BLOCK] if v is not None] for i in range(0, len(nll), BLOCK)]
    return tuple((-math.fsum(part), len(part)) for part in parts if part)


def adds_up(blocks: Sequence[tuple[float, int]], value: Any) -> bool:
    """Whether a score (log-likelihood, tokens) is that of all blocks together."""
    if not (isinstance(value, list) and len(value) == 2 and all(map(is_number, value))):
        return False
    total = math.fsum(ll for ll, _ in blocks)
    return bool(value[1] == sum(n for _, n in blocks) and abs(value[0] - total) <= 1e-4 * abs(value[0]))


def _answer(record: dict[str, Any], calls: list[dict[str, Any]]) -> tuple[str, str]:
    """A text, or the choice taken with all log-likelihoods, or the log-likelihood of a text."""
    filtered = record["filtered_resps"]
    first = filtered[0] if filtered else ""
    if isinstance(first, list) and first and len(filtered) == len(calls) and all(isinstance(r, list) for r in filtered):
        scored = [(float(r[0]), str(c.get("arg_1", "")).strip()) for r, c in zip(filtered, calls, strict=True) if r]
        best = max(scored)[1]
        return best, "\n".join(f"{score:9.2f}  {choice}" for score, choice in scored)
    if len(calls) == 1 and "arg_1" not in calls[0]:
        return "", f"log-likelihood {first}"
    raw = record["resps"]
    text = raw[0][0] if raw and isinstance(raw[0], list) and raw[0] else first
    return str(first), "" if str(text).strip() == str(first).strip() else f"before the filter: {text}"

"""What compression did to a run's requests: how many were touched, how much was kept, bytes and seconds it took."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any, NamedTuple

from kv_lm_eval.metrics import latency
from kv_lm_eval.metrics.latency import Timing


class RequestId(NamedTuple):
    """Which request a record is of: two tasks, or two documents of one, may ask with the same words."""

    task: str
    kind: str  # generate_until, loglikelihood, loglikelihood_rolling
    doc_id: int | None = None
    idx: int | None = None  # which request of its document
    prompt: str = ""  # digest of prompt and document, for requests that were made by hand and have no numbers


@dataclass
class RequestRecord:
    """One request. Sizes are of keys and values; kept_fraction counts the layers that the method may cut.

    question_tokens were fed after the compression (question_in_prompt=False), and `compressed` is what happened before
    that; None: the whole prompt was compressed. kv_bytes_read: what the last token has read of what is held at the end.
    answer_tokens: of what was generated, its stop included.
    over_budget: what the method always keeps was as much as the budget's share of the prompt, or more.
    """

    task: str
    kind: str
    prompt_tokens: int
    compressed: bool
    kept_fraction: float
    kv_bytes_prefill: float
    kv_bytes_decode: float
    kv_bytes_allocated: float
    overhead_bytes: float
    peak_slots: int
    kv_bytes_read: float = 0.0
    prompt: str = ""
    doc_id: int | None = None
    idx: int | None = None
    question_tokens: int | None = None
    question_empty: bool = False
    over_budget: bool = False
    answer_tokens: int | None = None
    timing: Timing | None = None

    def __post_init__(self) -> None:
        if isinstance(self.timing, dict):  # read back from JSON
            self.timing = Timing(**self.timing)

    @property
    def identity(self) -> RequestId:
        """Equal for the same request, in whichever process it was run."""
        return RequestId(self.task, self.kind, self.doc_id, self.idx, self.prompt)

    def efficiency(self) -> dict[str, Any]:
        """What one sample's record says of its request."""
        timing = asdict(self.timing) if self.timing else {}
        sizes = ("prompt_tokens", "kept_fraction", "kv_bytes_prefill", "kv_bytes_decode", "kv_bytes_read", "peak_slots")
        return {**{name: getattr(self, name) for name in sizes}, **timing}


OF_THE_MODEL = ("question_tokens", "question_empty", "answer_tokens", "timing")


def digest(what: Any) -> str:
    """Tells prompts and documents apart."""
    return hashlib.sha256(repr(what).encode(errors="replace")).hexdigest()[:16]


def records_of(
    asked: Sequence[RequestId], prefill: dict[str, Any], end: dict[str, Any], rows: Sequence[int] | None = None
) -> list[RequestRecord]:
    """The records of a batch, from the cache's snapshots at the end of the prefill and at the end.

    Args:
        end: may also hold, a list each, `timing`, `question_tokens` and `question_empty`.
        rows: the row of each request, which several may share; None: request b was row b.
    """
    question_first = "question_tokens" in end
    return [
        RequestRecord(
            **who._asdict(),
            prompt_tokens=prefill["seen"][b],
            compressed=prefill["compressed"][b] or (not question_first and end["compressed"][b]),
            kept_fraction=end["kept_fraction"][b],
            kv_bytes_prefill=prefill["kv_bytes_valid"][b],
            kv_bytes_decode=end["kv_bytes_valid"][b],
            kv_bytes_allocated=end["kv_bytes_allocated"],
            overhead_bytes=end["overhead_bytes"],
            peak_slots=end["peak_slots"][b],
            kv_bytes_read=end.get("kv_bytes_read", end["kv_bytes_valid"])[b],
            over_budget="over_budget" in prefill and prefill["over_budget"][b],
            **{name: end[name][b] for name in OF_THE_MODEL if name in end},
        )
        for b, who in zip(range(len(asked)) if rows is None else rows, asked, strict=True)
    ]


@dataclass
class CompressionLog:
    """Collects the records of one evaluation; ranks are merged by concatenation.

    The same request asked again (repeats, the copies with which lm-eval evens out ranks) is counted once. Requests that
    --use_cache answers have no records; they are counted.
    """

    records: list[RequestRecord] = field(default_factory=list)
    from_request_cache: int = 0
    _known: set[RequestId] = field(default_factory=set)
    _told: bool = False  # whether the evaluation has ended

    def add_batch(self, records: Sequence[RequestRecord]) -> None:
        """The records of one batch."""
        for record in records:
            if record.identity not in self._known:
                self._known.add(record.identity)
                self.records.append(record)

    def begin(self) -> None:
        """A request comes: after an evaluation that has ended it is the first of another."""
        if self._told:
            self.records, self.from_request_cache, self._known, self._told = [], 0, set(), False

    def end(self) -> None:
        """The evaluation has ended, well or not."""
        self._told = True

    def answered_from_cache(self) -> None:
        """--use_cache has answered a request, which no model sees."""
        self.begin()
        self.from_request_cache += 1

    def hand_over(self) -> tuple[list[RequestRecord], int]:
        """What another rank is to count."""
        counted = self.records, self.from_request_cache
        self.records, self.from_request_cache = [], 0
        return counted

    def take_over(self, counted: Sequence[tuple[list[RequestRecord], int]]) -> None:
        """What the ranks, this one among them, have handed over."""
        for records, answers in counted:
            self.records += records
            self.from_request_cache += answers

    def summary(self) -> dict[str, Any]:
        """Numbers of the whole run, and per task; two if no request was run (all answered from a cache)."""
        if not self.records:
            return {"requests": 0, "from_request_cache": self.from_request_cache}
        out = {**_summary(self.records), "from_request_cache": self.from_request_cache}
        tasks = sorted({r.task for r in self.records})
        out["by_task"] = {t: _summary([r for r in self.records if r.task == t]) for t in tasks}
        return out


def uncut(lengths: list[int], most: int, bytes_per_token: int) -> dict[str, Any]:
    """The snapshot of requests that ran without a compressed cache: all of their tokens held, at most `most`.

    Args:
        bytes_per_token: of keys and values; 0 where there was no cache at all.
    """
    held = [min(n, most) for n in lengths]
    return {
        "seen": lengths,
        "kept_fraction": [1.0 if bytes_per_token else 0.0] * len(lengths),
        "compressed": [False] * len(lengths),
        "kv_bytes_valid": [n * bytes_per_token for n in held],
        "kv_bytes_allocated": max(held, default=0) * bytes_per_token,
        "overhead_bytes": 0,
        "peak_slots": [n if bytes_per_token else 0 for n in held],
    }


def _summary(records: list[RequestRecord]) -> dict[str, Any]:
    lengths = [r.prompt_tokens for r in records]
    out: dict[str, Any] = {
        "requests": len(records),
        "compressed_share": fmean(r.compressed for r in records),
        "kept_fraction_mean": fmean(r.kept_fraction for r in records),
        "kept_fraction_min": min(r.kept_fraction for r in records),
        "kept_fraction_max": max(r.kept_fraction for r in records),
        "prompt_tokens": _range(lengths),
        "kv_bytes_prefill_mean": fmean(r.kv_bytes_prefill for r in records),
        "kv_bytes_decode_mean": fmean(r.kv_bytes_decode for r in records),
        "kv_bytes_read_mean": fmean(r.kv_bytes_read for r in records),
        "kv_bytes_allocated_mean": fmean(r.kv_bytes_allocated for r in records),
        "overhead_bytes_mean": fmean(r.overhead_bytes for r in records),
        "peak_slots": max(r.peak_slots for r in records),
        "over_budget": sum(r.over_budget for r in records),
    }
    if questions := [(r.question_tokens, r.prompt_tokens) for r in records if r.question_tokens is not None]:
        out["question_tokens"] = _range([asked for asked, _ in questions])
        out["context_share"] = _range([round(1 - min(asked, n) / n, 4) for asked, n in questions if n])
        out["empty_questions"] = sum(r.question_empty for r in records)
    if timings := [r.timing for r in records if r.timing is not None]:
        out["efficiency"] = latency.summary(timings)
    told = (r.answer_tokens if r.timing is None else r.timing.new_tokens for r in records)
    if answers := [n for n in told if n is not None]:
        out["answer_tokens"] = {**_range(answers), "longest": answers.count(max(answers))}
        out["answer_tokens_mean"] = fmean(answers)
    return out


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}

"""What compression did to a run's requests: how many were touched, how much was kept, how many bytes it took."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any


@dataclass
class RequestRecord:
    """One request. Sizes are of keys and values; kept_fraction counts the layers that the method may cut."""

    task: str
    kind: str  # generate_until, loglikelihood, loglikelihood_rolling
    prompt_tokens: int
    compressed: bool
    kept_fraction: float
    kv_bytes_prefill: float
    kv_bytes_decode: float
    kv_bytes_allocated: float
    overhead_bytes: float
    peak_slots: int


@dataclass
class CompressionLog:
    """Collects records; ranks are merged by concatenation.

    The same request asked again (repeats, the copies with which lm-eval evens out ranks) is counted once.
    """

    records: list[RequestRecord] = field(default_factory=list)
    _known: set[Hashable] = field(default_factory=set)

    def add_batch(
        self, tasks: list[str], prompts: Sequence[Hashable], kind: str, prefill: dict[str, Any], end: dict[str, Any]
    ) -> None:
        """One batch, from the cache's snapshots at the end of the prefill and at the end."""
        for b, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
            if (task, kind, prompt) in self._known:
                continue
            self._known.add((task, kind, prompt))
            self.records.append(
                RequestRecord(
                    task=task,
                    kind=kind,
                    prompt_tokens=prefill["seen"][b],
                    compressed=prefill["compressed"][b] or end["compressed"][b],
                    kept_fraction=end["kept_fraction"][b],
                    kv_bytes_prefill=prefill["kv_bytes_valid"][b],
                    kv_bytes_decode=end["kv_bytes_valid"][b],
                    kv_bytes_allocated=end["kv_bytes_allocated"],
                    overhead_bytes=end["overhead_bytes"],
                    peak_slots=end["peak_slots"][b],
                )
            )

    def summary(self) -> dict[str, Any]:
        """Numbers of the whole run, and per task; empty if no request was run (all answered from a cache)."""
        if not self.records:
            return {"requests": 0}
        out = _summary(self.records)
        tasks = sorted({r.task for r in self.records})
        out["by_task"] = {t: _summary([r for r in self.records if r.task == t]) for t in tasks}
        return out


def _summary(records: list[RequestRecord]) -> dict[str, Any]:
    lengths = [r.prompt_tokens for r in records]
    return {
        "requests": len(records),
        "compressed_share": fmean(r.compressed for r in records),
        "kept_fraction_mean": fmean(r.kept_fraction for r in records),
        "prompt_tokens": {"min": min(lengths), "median": median(lengths), "max": max(lengths)},
        "kv_bytes_prefill_mean": fmean(r.kv_bytes_prefill for r in records),
        "kv_bytes_decode_mean": fmean(r.kv_bytes_decode for r in records),
        "kv_bytes_allocated_mean": fmean(r.kv_bytes_allocated for r in records),
        "overhead_bytes_mean": fmean(r.overhead_bytes for r in records),
        "peak_slots": max(r.peak_slots for r in records),
    }

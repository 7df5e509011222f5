"""What the caches of some calls held and what they took, in one line for a person and by name for a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Report:
    """Answers of one or more calls; an answer is a row of a batch.

    Attributes:
        method: its name. answers: how many. compressed: of these, where anything was evicted or quantised.
        prompt_tokens, new_tokens: of all answers together.
        kept_fraction: of the tokens seen, the share whose pairs are held at the end, in the layers that may be cut;
            mean over the answers.
        kv_bytes: of keys and values held at the end, all answers together. kv_bytes_full: what the full cache would
            hold of the same tokens.
        ttft_s: to the first new token, mean over the calls. total_s, compression_s: of all calls, the second a part of
            the first. None: not measured.
    """

    method: str
    answers: int = 0
    compressed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    kept_fraction: float = 1.0
    kv_bytes: float = 0.0
    kv_bytes_full: float = 0.0
    ttft_s: float | None = None
    total_s: float | None = None
    compression_s: float | None = None

    def __str__(self) -> str:
        if not self.answers:
            return f"{self.method}: nothing was read yet"
        times = "" if self.total_s is None else f"; {self.ttft_s:.2f} s to the first token, {self.total_s:.2f} s in all"
        if self.total_s is not None and self.compression_s is not None:
            times += f", {self.compression_s:.2f} s of it compression"
        return (
            f"{self.method}: {self.answers} answer{'s' * (self.answers > 1)} ({self.compressed} compressed), "
            f"{self.prompt_tokens} + {self.new_tokens} tokens, {self.kept_fraction:.0%} kept; "
            f"{_size(self.kv_bytes)} of keys and values, {_size(self.kv_bytes_full)} in the full cache{times}"
        )


def _size(count: float) -> str:
    unit, name = (2**20, "MiB") if count >= 2**20 else (2**10, "KiB")
    return f"{count / unit:.1f} {name}"


def of_snapshots(method: str, bytes_per_token: float, begin: dict[str, Any] | None, end: dict[str, Any]) -> Report:
    """The report of one cache, without times.

    Args:
        begin, end: its snapshots after the prompts, None where there were none, and now.
    """
    seen = end["seen"]
    before = begin["seen"] if begin else seen
    if not seen:
        return Report(method)
    return Report(
        method,
        len(seen),
        sum(end["compressed"]),
        sum(before),
        sum(seen) - sum(before),
        fmean(end["kept_fraction"]),
        sum(end["kv_bytes_valid"]),
        sum(seen) * bytes_per_token,
    )


def together(method: str, reports: Sequence[Report]) -> Report:
    """Those of several calls as one."""
    answers = sum(r.answers for r in reports)
    if not answers:
        return Report(method)
    first, total, cuts = ([getattr(r, n) for r in reports] for n in ("ttft_s", "total_s", "compression_s"))
    return Report(
        method,
        answers,
        sum(r.compressed for r in reports),
        sum(r.prompt_tokens for r in reports),
        sum(r.new_tokens for r in reports),
        sum(r.kept_fraction * r.answers for r in reports) / answers,
        sum(r.kv_bytes for r in reports),
        sum(r.kv_bytes_full for r in reports),
        ttft_s=None if None in first else fmean(first),
        total_s=None if None in total else sum(total),
        compression_s=None if None in cuts else sum(cuts),
    )

"""How long a request took: time to the first token, time per further token, throughput, time spent on compression.

Rules: the clock starts when the prompt's ids are on the device, and the device is synchronised at the start, at the
first token and at the end, never in between. All rows of a batch share the batch's times, which is why its size stands
beside them. The first batch of each kind of request warms the device up: it is marked and left out of the aggregates.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch

from kv_lm_eval.metrics.memory import PeakMemory


@dataclass(frozen=True)
class Timing:
    """One request, by the clock of its batch.

    Attributes:
        batch_size: prompts in the batch. warm_up: left out of the aggregates.
        total_s: from the ids on the device to the batch's last token (or score) on the host.
        compression_s: of it, spent in cuts; None: not known (a model over several devices).
        prefill_peak_bytes: memory above the weights up to the first token (of the whole request, where nothing is
            generated); decode_peak_bytes: after it. None: not known on this device.
        new_tokens: of this request, its stop included.
        ttft_s: to the first token id on the host: prefill, compression and sampling. None: nothing was generated.
        tpot_s: (total_s - ttft_s) / (tokens of the longest answer - 1); None for answers of one token.
        tokens_per_s: new tokens of the whole batch / total_s. decode_tokens_per_s: without the first of each row,
            / (total_s - ttft_s).
    """

    batch_size: int
    warm_up: bool
    total_s: float
    compression_s: float | None
    prefill_peak_bytes: int | None
    decode_peak_bytes: int | None
    new_tokens: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


TIMES = ("ttft_s", "tpot_s", "total_s", "compression_s", "tokens_per_s", "decode_tokens_per_s")
PEAKS = ("prefill_peak_bytes", "decode_peak_bytes")


class Stopwatch:
    """The moments of one batch; starts when it is made."""

    def __init__(self, memory: PeakMemory, device: torch.device) -> None:
        self._memory, self._device = memory, device
        self._cut_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._first: float | None = None
        self._prefill_peak: int | None = None
        self._start = self._now()
        memory.restart()

    def _now(self) -> float:
        for device in self._memory.devices:
            torch.cuda.synchronize(device)
        if self._device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    @contextmanager
    def around_cut(self) -> Iterator[None]:
        """Measures a cut: on CUDA by events in its stream, read at the end."""
        if self._device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            start = time.perf_counter()
            yield
            self._cut_s += time.perf_counter() - start

    def first_token(self) -> None:
        """The first new token of the batch is on the host."""
        self._first = self._now()
        self._prefill_peak = self._memory.read()
        self._memory.restart()

    def end(self) -> None:
        """The batch's last token, or its scores, are on the host."""
        self._end = self._now()
        self._peak = self._memory.read()

    def timings(
        self, batch_size: int, warm_up: bool, new_tokens: Sequence[int] | None = None, steps: int = 0
    ) -> list[Timing]:
        """One Timing a request.

        Args:
            new_tokens: of each request; None where nothing was generated. steps: tokens that the batch generated, those
                after a row's stop included.
        """
        end, peak = self._end, self._peak
        total = end - self._start
        cut = self._cut_s + sum(a.elapsed_time(b) for a, b in self._events) / 1000
        common: dict[str, Any] = {
            "batch_size": batch_size,
            "warm_up": warm_up,
            "total_s": total,
            "compression_s": None if len(self._memory.devices) > 1 else cut,
        }
        if new_tokens is None:
            return [Timing(**common, prefill_peak_bytes=peak, decode_peak_bytes=None)] * batch_size
        if self._first is None or steps < 2:  # the first token was the last
            common.update(ttft_s=total, prefill_peak_bytes=peak, decode_peak_bytes=None)
        else:
            decode = end - self._first
            common.update(
                ttft_s=self._first - self._start,
                tpot_s=decode / (steps - 1),
                decode_tokens_per_s=sum(n - 1 for n in new_tokens) / decode,
                prefill_peak_bytes=self._prefill_peak,
                decode_peak_bytes=peak,
            )
        return [Timing(**common, new_tokens=n, tokens_per_s=sum(new_tokens) / total) for n in new_tokens]


def summary(timings: Iterable[Timing]) -> dict[str, Any]:
    """Median, p10, p90 and n of each number over the requests that have it, warm-up left out; None over nothing."""
    timings = list(timings)
    counted = [t for t in timings if not t.warm_up]
    out: dict[str, Any] = {"requests": len(counted), "warm_up_requests": len(timings) - len(counted)}
    out["batch_size"] = spread(t.batch_size for t in counted)
    for name in (*TIMES, *PEAKS):
        out[name] = spread(v for t in counted if (v := getattr(t, name)) is not None)
    return out


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, p10 and p90, interpolated, and how many values there were."""
    values = list(values)
    if not values:
        return {"median": None, "p10": None, "p90": None, "n": 0}
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"median": tenths[4], "p10": tenths[0], "p90": tenths[8], "n": len(values)}

"""One loop for everything that is timed: warm-up, device synchronised at both ends, repeats in turn, the spread.

The things to be compared take turns in every round, so that a machine that gets slower in the middle slows all of them.
On a CPU that others use as well, wall time says how busy they are: there the numbers are CPU time of this process, and
wall time stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kv_lm_eval.metrics.latency import spread


@dataclass
class Times:
    """Repeats of one piece of work.

    Attributes:
        wall_s: seconds each. cpu_s: seconds of CPU time of this process each. per: units of work in one repeat
            (tokens); all results are per unit.
    """

    per: int = 1
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def record(self, clock: str) -> dict[str, Any]:
        """Median, p10, p90 and n of the seconds per unit by that clock ("cpu" or "wall"), and those of each round; the
        wall median too."""
        values = [v / self.per for v in (self.cpu_s if clock == "cpu" else self.wall_s)]
        numbers: dict[str, Any] = {**spread(values), "rounds": values}
        numbers["wall_median"] = spread(v / self.per for v in self.wall_s)["median"]
        return numbers


def clock_of(device: torch.device) -> str:
    """Which clock the numbers of a device are read from."""
    return "cpu" if device.type == "cpu" else "wall"


def synchronise(device: torch.device) -> None:
    """Waits for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def now(device: torch.device) -> float:
    """Seconds by the clock of the device, when its work so far is done."""
    synchronise(device)
    return time.process_time() if clock_of(device) == "cpu" else time.perf_counter()


class Stopwatch:
    """Sums the seconds spent inside."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.total = device, 0.0

    def __enter__(self) -> None:
        self.start = now(self.device)

    def __exit__(self, *args: Any) -> None:
        self.total += now(self.device) - self.start


def rounds(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    warm_up: int,
    per: Mapping[str, int] | int = 1,
) -> dict[str, Times]:
    """Times each piece of work `repeats` times, in turn, after `warm_up` rounds that are thrown away."""
    times = {name: Times(per if isinstance(per, int) else per[name]) for name in works}
    for i in range(warm_up + repeats):
        for name, work in works.items():
            synchronise(device)
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            synchronise(device)
            if i >= warm_up:
                times[name].wall_s.append(time.perf_counter() - wall)
                times[name].cpu_s.append(time.process_time() - cpu)
    return times


def bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Bytes a second that a copy within the device's memory moves, reading and writing counted: the best of five."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    copies = rounds({"copy": lambda: target.copy_(source)}, device, repeats=5, warm_up=1)["copy"]
    best = min(copies.cpu_s if clock_of(device) == "cpu" else copies.wall_s)
    return 2 * source.numel() * source.element_size() / best

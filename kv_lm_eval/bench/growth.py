"""How time and memory of a prompt grow with its length: numbers, slopes, and a picture.

A slope is that of the line in a picture with logarithmic axes: 1 grows with the length, 2 with its square. It is taken
between the last two lengths, where what grows fastest has come to the fore. `bend` is the length at which the square's
share reaches half: n* of t = a n + b n^2, by the last two lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import torch

from kv_lm_eval.bench.measure import Bench, in_chunks, peak_bytes
from kv_lm_eval.bench.timing import now, rounds
from kv_lm_eval.engine.prefill import NewCache, prefill

OFTEN = 4096  # tokens up to which a length is run `repeats` times; longer ones once, the best of them counts
WHY = {
    "full": "attention: every token over all before it; keys and values: one pair a token",
    "snapkv": "attention of the prompt is the full cache's; held: one layer whole, the others cut",
    "h2o": "the same, and every weight is summed: no more memory, since weights are made a block at a time",
    "streaming_llm, prefill_evict": "cut after every chunk: a token sees no more than budget and chunk",
    "full, prefill_chunk": "attention and pairs are the full cache's; activations are a chunk's",
}


def entries(bench: Bench, chunk: int) -> dict[str, NewCache]:
    """What is measured, by the names of WHY."""
    return {
        "full": bench.new_cache("full"),
        "snapkv": bench.new_cache("snapkv"),
        "h2o": bench.new_cache("h2o"),
        "streaming_llm, prefill_evict": in_chunks(bench, "streaming_llm", chunk, True),
        "full, prefill_chunk": in_chunks(bench, "full", chunk, False),
    }


@torch.inference_mode()
def growth(bench: Bench, lengths: Sequence[int], chunk: int) -> dict[str, Any]:
    """Seconds and peak bytes above the weights of a prompt of each length, by method."""
    out: dict[str, Any] = {name: {} for name in entries(bench, chunk)}
    for n in sorted(lengths):
        row = bench.tokens(n)
        for name, new_cache in entries(bench, chunk).items():
            work = partial(prefill, bench.model, new_cache, [row])
            start = now(bench.device)
            peak = peak_bytes(bench, new_cache, row)
            seconds = [now(bench.device) - start]
            if n <= OFTEN:
                again = rounds({name: work}, bench.device, repeats=2, warm_up=0)[name]
                seconds += again.cpu_s if bench.clock == "cpu" else again.wall_s
            out[name][str(n)] = {"seconds": min(seconds), "bytes": peak}
    found = {name: {"at": at, "why": WHY[name], **slopes(at)} for name, at in out.items()}
    return {"chunk": chunk, "capacity": bench.capacity, "entries": found}


def slopes(at: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Of seconds and bytes between the last two lengths, and the bend of the seconds, None: no part with the square."""
    if len(at) < 2:
        return {"seconds_slope": None, "bytes_slope": None, "bend": None}
    (n1, first), (n2, last) = list(pairwise(at.items()))[-1]
    x1, x2 = int(n1), int(n2)
    per_token = first["seconds"] / x1, last["seconds"] / x2  # a + b n
    b = (per_token[1] - per_token[0]) / (x2 - x1)
    a = per_token[0] - b * x1
    return {
        **{f"{what}_slope": log(last[what] / first[what]) / log(x2 / x1) for what in ("seconds", "bytes")},
        "bend": round(a / b) if b > 0 and a > 0 else None,
    }


def draw(part: Mapping[str, Any], path: Path) -> None:
    """The picture: seconds and bytes against the length, both axes logarithmic, with the slopes at the lines' ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (what, label, scale) in zip(
        figure.subplots(1, 2), (("seconds", "seconds", 1), ("bytes", "MiB above the weights", 2**20)), strict=True
    ):
        for name, entry in part["entries"].items():
            lengths = [int(n) for n in entry["at"]]
            slope = entry[f"{what}_slope"]
            text = name if slope is None else f"{name} (slope {slope:.2f})"
            axes.loglog(lengths, [e[what] / scale for e in entry["at"].values()], "o-", label=text, markersize=3)
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel(label)
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)

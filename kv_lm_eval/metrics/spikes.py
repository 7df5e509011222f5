"""Does pruning make the next tokens harder? Spikes of the nll after prune events, against the same text elsewhere.

Every statistic is of the difference to a reference run on the same tokens, so that hard text does not look like a
spike, and is compared with the same statistic at positions where nothing was pruned, so that noise does not either.

Delta_i = nll_i(method) - nll_i(reference), nats. An event at i_e came after token i_e was scored; its window is
i_e + 1 .. i_e + horizon. peak: largest Delta in the window; area: sum of its positive part; width: longest run above
`threshold`; mean: signed. Controls are windows of the same length that touch no event's window: random ones, and those
that begin in the middle between two events.

That is not enough: a cache that is pruned lazily holds the more the longer the last prune is ago, and so gets better
up to the next one. Right after a prune it is back where a cache pruned at every token always is. So the loss there must
besides be above that of such a cache, which holds as much: a saw-tooth that only ever helps is no spike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kv_lm_eval.stats.intervals import LEVEL, Interval, of_difference, of_mean

STATISTICS = ("peak", "area", "width", "mean")
CONTROLS = ("middle", "random")
FEWEST = 8  # events, below which an interval would mean nothing


def window_statistics(delta: np.ndarray, starts: Sequence[int], horizon: int, threshold: float) -> dict[str, Any]:
    """The four statistics of the windows that begin at `starts`: arrays of one number a window."""
    windows = np.stack([delta[s : s + horizon] for s in starts]) if len(starts) else np.zeros((0, horizon))
    return {
        "peak": windows.max(1) if len(windows) else np.zeros(0),
        "area": windows.clip(min=0).sum(1),
        "width": np.array([_longest_run(w > threshold) for w in windows], dtype=float),
        "mean": windows.mean(1) if len(windows) else np.zeros(0),
    }


def _longest_run(above: np.ndarray) -> int:
    best = run = 0
    for one in above:
        run = run + 1 if one else 0
        best = max(best, run)
    return best


def usable_horizon(events: Sequence[int], wanted: int) -> int:
    """The longest window that leaves room for a control of the same length between two events."""
    gaps = np.diff(np.array(events))
    return min(wanted, int(np.median(gaps)) // 2) if len(gaps) else wanted


def control_starts(events: Sequence[int], tokens: int, horizon: int) -> list[int]:
    """Where a window after the first event and before the last token touches no event's window."""
    taken = np.zeros(tokens + 1, dtype=bool)
    for e in events:
        taken[e + 1 : e + 1 + horizon] = True
    covered = np.concatenate([[0], np.cumsum(taken)])
    first = min(events) + 1 if len(events) else 0
    return [s for s in range(first, tokens - horizon + 1) if covered[s + horizon] == covered[s]]


def spikes(
    delta: np.ndarray,
    events: Sequence[int],
    horizon: int = 16,
    threshold: float = 0.1,
    level: float = LEVEL,
    seed: int = 0,
    equal: np.ndarray | None = None,
) -> dict[str, Any]:
    """Event windows against control windows, with intervals over the windows.

    Args:
        delta: per-token difference to the reference, nats. events: indices of the last tokens scored before a prune.
        horizon: tokens of a window; shortened to half the usual distance of two events. threshold: nats, for width.
        seed: of the random control windows.
        equal: the difference to a run that holds no more slots than the method does after a prune, where the reference
            is another one; None: delta.

    Returns:
        verdict: "spike" if peak, area or mean after events is above both controls (each interval excludes zero, at a
        level corrected for asking three statistics) and the loss there is above that of equal slots, "no spike"
        otherwise, "too few events" with fewer than 8 windows; reason: in words; statistics: medians, 90th percentiles
        and differences with intervals; above_equal_slots: mean difference over the first tokens after an event, by how
        many tokens.
    """
    delta, events = np.asarray(delta, dtype=np.float64), sorted(events)
    horizon = usable_horizon(events, horizon)
    out: dict[str, Any] = {"horizon": horizon, "threshold_nats": threshold, "events": len(events)}
    nothing: dict[str, Any] = {"verdict": "too few events", "statistics": {}, "above_equal_slots": {}}
    if horizon < 1:
        reason = "something is pruned at every token, so that there is no text without a prune to compare with"
        return {**out, **nothing, "reason": reason}
    inside = [e for e in events if e + 1 + horizon <= len(delta)]
    free = control_starts(events, len(delta), horizon)
    rng = np.random.default_rng(seed)
    middles = [(a + b) // 2 + 1 for a, b in zip(events, events[1:], strict=False)]
    starts = {
        "event": [e + 1 for e in inside],
        "middle": [m for m in middles if m in set(free)],
        "random": _apart(rng.permutation(free).tolist(), horizon, len(inside)),
    }
    out["windows"] = {kind: len(s) for kind, s in starts.items()}
    if min(map(len, starts.values())) < FEWEST:
        reason = f"an interval needs at least {FEWEST} windows of each kind, there are {out['windows']}"
        return {**out, **nothing, "reason": reason}
    values = {kind: window_statistics(delta, s, horizon, threshold) for kind, s in starts.items()}
    each = 1 - (1 - level) / 3  # three statistics may each say "spike"
    statistics: dict[str, Any] = {}
    for name in STATISTICS:
        at = values["event"][name]
        statistics[name] = {"median": float(np.median(at)), "p90": float(np.quantile(at, 0.9))}
        for control in CONTROLS:
            statistics[name][f"minus_{control}"] = _numbers(of_difference(at, values[control][name], each))
    above = _above_equal(
        delta if equal is None else np.asarray(equal, dtype=np.float64), starts["event"], horizon, level
    )
    higher = [n for n in ("peak", "area", "mean") if all(statistics[n][f"minus_{c}"]["low"] > 0 for c in CONTROLS)]
    worse = any(found["low"] > 0 for found in above.values())
    most = max(statistics["peak"][f"minus_{c}"]["high"] for c in CONTROLS)
    if higher:
        reason = f"{' and '.join(higher)} after events {'is' if len(higher) == 1 else 'are'} above both controls"
        if not worse:
            reason += ", but the loss is not above that of a cache with as many slots: between events it is lower"
    elif most > 0:
        reason = f"nothing after events is above both controls; peaks {most:.2g} nats above them are excluded"
    else:
        reason = "nothing after events is above both controls; peaks there are lower, if anything"
    verdict = "spike" if higher and worse else "no spike"
    return {**out, "verdict": verdict, "reason": reason, "statistics": statistics, "above_equal_slots": above}


def _apart(starts: Sequence[int], horizon: int, most: int) -> list[int]:
    """The first of these windows, in the order given, that share no token with one taken before."""
    taken: set[int] = set()
    out: list[int] = []
    for start in starts:
        window = range(start, start + horizon)
        if len(out) < most and taken.isdisjoint(window):
            taken.update(window)
            out.append(start)
    return sorted(out)


def _above_equal(equal: np.ndarray, starts: Sequence[int], horizon: int, level: float) -> dict[str, dict[str, float]]:
    """Mean difference over the first 1, 2, 4, ... tokens after events: a spike may last one token or all of them."""
    lengths = sorted({min(2**i, horizon) for i in range(horizon.bit_length() + 1)})
    each = 1 - (1 - level) / len(lengths)
    return {str(n): _numbers(of_mean([equal[start : start + n].mean() for start in starts], each)) for n in lengths}


def _numbers(found: Interval) -> dict[str, float]:
    assert found.low is not None and found.high is not None
    return {"mean": found.mean, "low": found.low, "high": found.high}


def around_events(delta: np.ndarray, events: Sequence[int], before: int, after: int) -> dict[str, list[float]]:
    """Mean Delta at each distance from an event, with a 95 % interval over events: what the picture shows.

    Distance 0 is the last token before the prune.
    """
    inside = [e for e in events if e - before >= 0 and e + after < len(delta)]
    if not inside:
        return {"distance": [], "mean": [], "low": [], "high": []}
    rows = np.stack([delta[e - before : e + after + 1] for e in inside])
    found = [of_mean(column) for column in rows.T]
    return {
        "distance": list(range(-before, after + 1)),
        "mean": rows.mean(0).tolist(),
        "low": [f.mean if f.low is None else f.low for f in found],
        "high": [f.mean if f.high is None else f.high for f in found],
    }

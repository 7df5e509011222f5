"""How far each method is from the full cache, of runs with fidelity=True and of the tasks kv_fidelity_*.

lm-eval's results hold it under `fidelity`, task by task (requests/verdicts.py). A method is within the noise floor
where its divergence is no larger than the full cache's from itself, computed in other forwards (≈) or in bfloat16 (~).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kv_lm_eval.reporting.cells import Report, Row
from kv_lm_eval.reporting.run import is_number
from kv_lm_eval.reporting.table import Table, Value
from kv_lm_eval.reporting.tables import MISSING

LEGEND = (
    "KL(full cache || method) in nats a token, mean with its 95 % interval over texts or blocks of tokens. ≈ at most "
    "twice the full cache's divergence from itself in other forwards, ~ at most twice that in bfloat16: within the "
    "noise. Same top: share of tokens on which both find the same one most likely. Δp: of the token that came. "
    "Evidence kept, evicted: of the answer's tokens that repeat what the prompt says, by whether more than half of "
    "its pairs are held. Identical: answers with the same tokens; length: of answers, and of the full cache's; flips: "
    "right to wrong (-) and wrong to right (+), p of McNemar's exact test. KL of answers is along the full cache's own "
    "ones. KV: bytes of keys and values with what goes with them, mean over requests. Definitions: docs/fidelity.md."
)
WITHIN = 2  # times the noise floor, which is itself measured on few tokens


@dataclass(frozen=True)
class Measured:
    """One method's numbers on one task.

    Attributes:
        numbers: as in lm-eval's results. bytes: kept, overhead included; None where that is not known.
    """

    row: Row
    task: str
    numbers: dict[str, Any]
    bytes: float | None

    @property
    def along(self) -> dict[str, Any]:
        """llama.cpp's statistics, as `stats.fidelity.as_plain` names them."""
        return self.numbers.get("along_base") or {}

    @property
    def kl(self) -> float | None:
        """The mean; None where there is none, or an infinite one."""
        found = self.along.get("kl")
        return found if is_number(found) else None

    def floor(self, kind: str) -> float | None:
        """Mean KL of the full cache against itself."""
        found = (self.numbers.get("noise_floor") or {}).get(kind)
        return found if is_number(found) else None

    @property
    def mark(self) -> str:
        """≈ or ~ within a noise floor, else nothing."""
        if self.kl is None:
            return ""
        floors = {"≈": self.floor("chunking"), "~": self.floor("bfloat16")}
        return next((mark for mark, floor in floors.items() if floor is not None and self.kl <= WITHIN * floor), "")


def measured(report: Report) -> list[Measured]:
    """Everything there is, task by task."""
    out = []
    for task in dict.fromkeys(column.task for column in report.columns):
        for row in report.rows:
            run = row.run_of(task)
            numbers = ((run.results.get("fidelity") or {}) if run else {}).get(task)
            if numbers:
                parts = [row.stat(name, [task]) for name in ("kv_bytes_prefill_mean", "overhead_bytes_mean")]
                kept = None if parts[0] is None else parts[0] + (parts[1] or 0.0)
                out.append(Measured(row, task, numbers, kept))
    return out


def table(report: Report) -> Table | None:
    """Methods and tasks down, statistics across; None where nothing was compared."""
    found = measured(report)
    if not found:
        return None
    answers = any("answers" in one.numbers for one in found)
    flips = any(one.numbers.get("flips") for one in found)
    evidence = any(one.numbers.get("by_evidence") for one in found)
    groups = [("", 2), ("cache", 1), ("KL to the full cache", 4), ("tokens", 3)]
    groups += [("KL by evidence", 2)] * evidence + [("answers", 2 * answers + flips)] * bool(answers or flips)
    head = [("method", ""), ("task", ""), ("KV", "KiB"), ("KL", "nats"), ("median", ""), ("99 %", ""), ("largest", "")]
    head += [("same top", "%"), ("Δp RMS", "%"), ("PPL ratio", "")]
    head += [("evidence kept", "KL"), ("evicted", "KL")] * evidence
    head += [("identical", "%"), ("length", "tokens")] * answers + [("flips", "p")] * flips
    rows = []
    for one in found:
        s = one.along
        cells = [Value(one.row.label), Value(one.task), _scaled(one.bytes, 2**-10, ",.0f"), _mean(one)]
        cells += [_small(s.get(name)) for name in ("kl_p50", "kl_p99", "kl_max")]
        cells += [_scaled(s.get("same_top"), 100, ".2f", s.get("same_top_se"))]
        cells += [_scaled(s.get("delta_p_rms"), 100, ".2f", s.get("delta_p_rms_se"))]
        cells += [_scaled(s.get("ppl_ratio"), 1, ".4f", s.get("ppl_ratio_se"))]
        if evidence:
            cells += [_of_evidence(one, name) for name in ("kept", "evicted")]
        if answers:
            of_answers = one.numbers.get("answers") or {}
            cells += [_scaled(of_answers.get("identical"), 100, ".1f"), _lengths(of_answers)]
        if flips:
            cells.append(_flips(one.numbers.get("flips") or {}))
        rows.append(cells)
    return Table("fidelity", "Fidelity to the full cache", head, rows, LEGEND, _floors(found), groups)


def _floors(found: list[Measured]) -> list[str]:
    said = []
    for kind, words in (("chunking", "in forwards of other lengths"), ("bfloat16", "in bfloat16")):
        known = {one.task: floor for one in found if (floor := one.floor(kind)) is not None}
        if known:
            told = "; ".join(f"{task} {small(floor)}" for task, floor in known.items())
            said.append(f"Noise floor, mean KL of the full cache against itself {words}: {told}.")
    return said


def _mean(one: Measured) -> Value:
    text = _small(one.along.get("kl")).text
    low, high = one.along.get("kl_low"), one.along.get("kl_high")
    interval = f"{small(low)} to {small(high)}" if is_number(low) and is_number(high) else ""
    lines = f"{text} {one.mark}".strip()
    whole = f"{lines} ({interval})" if interval else lines
    return Value(whole, one.kl, "noise" if one.mark else "", lines=f"{lines}\n{interval}" if interval else lines)


def _of_evidence(one: Measured, name: str) -> Value:
    """Of the tokens that repeat what the prompt says."""
    found = (one.numbers.get("by_evidence") or {}).get(name) or {}
    value = found.get("mean")
    if not is_number(value):
        return Value(MISSING)
    low, high = found.get("low"), found.get("high")
    interval = f", {small(low)} to {small(high)}" if is_number(low) and is_number(high) else ""
    kept = f"{found['tokens']:g} tokens, {100 * (found.get('kept_share') or 0):.0f} % of their pairs kept"
    return Value(small(value), value, title=f"{kept}{interval}")


def _lengths(answers: dict[str, Any]) -> Value:
    """Of the answers, and of the full cache's."""
    ours, base = answers.get("tokens_mean"), answers.get("base_tokens_mean")
    if not is_number(ours) or not is_number(base):
        return Value(MISSING)
    return Value(f"{ours:.1f} of {base:.1f}", ours - base, title="mean tokens of the answers, and of the full cache's")


def _flips(flips: dict[str, Any]) -> Value:
    """Of the metric with most of them."""
    if not flips:
        return Value(MISSING)
    name, most = max(flips.items(), key=lambda item: item[1]["right_to_wrong"] + item[1]["wrong_to_right"])
    text = f"-{most['right_to_wrong']} +{most['wrong_to_right']} (p {most['p']:.2g})"
    return Value(text, most["wrong_to_right"] - most["right_to_wrong"], title=f"{name}, {most['documents']} documents")


def _scaled(value: Any, factor: float, digits: str, error: Any = None) -> Value:
    if not is_number(value):
        return Value(MISSING)
    more = f" ± {error * factor:{digits}}" if is_number(error) else ""
    return Value(f"{value * factor:{digits}}{more}", value * factor)


def _small(value: Any) -> Value:
    if isinstance(value, float) and math.isinf(value):
        return Value("∞", math.inf, "bad", "a token that the full cache thinks possible is ruled out")
    return Value(small(value), value) if is_number(value) else Value(MISSING)


def small(value: float) -> str:
    """A divergence: three digits, whatever its size."""
    return "0" if not value else f"{value:.3g}" if value >= 1e-4 else f"{value:.0e}"

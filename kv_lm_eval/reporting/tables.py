"""A report's numbers as tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kv_lm_eval.reporting.cells import Cell, Column, Report, Row, every_score
from kv_lm_eval.reporting.families import titles
from kv_lm_eval.reporting.run import is_number
from kv_lm_eval.reporting.table import Table, Value
from kv_lm_eval.stats.paired import LEVEL, Comparison

MISSING, UNTOUCHED = "-", "°"
MARKS = {"within noise": "≈", "identical": "=", "too few documents": "?", "outside noise": "*", "unknown": ""}
TOLD = ("within noise", "identical", "outside noise")
SCORE_LEGEND = (
    "± is the standard error over documents (over texts, where several documents are about one); kept: share of pairs "
    "kept at the end of a request; KV: bytes of keys and values after the prefill, mean over requests. - not run; OOM "
    "out of memory; running: or stopped on the way; damaged: files left out; ° nothing was compressed, so this is the "
    "full cache's score."
)
DIFFERENCE_LEGEND = (
    "Difference to the full cache on the same documents, with its 95 % interval; documents about one text count as one "
    "observation, few long texts are cut into blocks of tokens. ≈ within noise; * outside noise (interval without 0, "
    "and less than 5 % of random swaps with a larger difference); = the same on every document; ? too few documents, "
    "or texts, to tell; ° nothing was compressed."
)
SPEED_LEGEND = (
    "Time and peaks (device memory above the weights): median (10 to 90 %) over requests, without the first batch; KV: "
    "mean over requests. answer: mean length, and how many times the full cache's that is. N/A: not measured, or the "
    "device cannot say. Times compare only if nothing else kept the machine busy."
)


def scores(report: Report) -> Table:
    """Methods down, tasks across."""
    head = [("method", ""), ("kept", "%"), ("KV", "KiB"), *_heads(report)]
    rows = []
    for row in report.rows:
        kept, kv = row.kept(), row.stat("kv_bytes_prefill_mean")
        start = [
            Value(row.label),
            Value(MISSING) if kept is None else Value(f"{100 * kept:.1f}", 100 * kept),
            Value(MISSING) if kv is None else Value(f"{kv / 1024:,.0f}", kv / 1024),
        ]
        rows.append(start + [_score(row.cells[c], c) for c in report.columns])
    groups = [("", 1), ("cache", 2), *titles(report.columns)]
    return Table("scores", "Scores", head, rows, SCORE_LEGEND, _unfinished(report), groups, errors_from=3)


TONES = {"missing": "", "scored": "", "planned": "noise", "running": "noise"}  # of states; of others "bad"
STATES = {"scored": "done", "running": "running", "failed": "failed", "OOM": "OOM", "damaged": "damaged"}
STATES |= {"planned": "not started"}


def progress(report: Report) -> Table | None:
    """How far the sweeps are; None where the folder holds none."""
    rows = []
    for sweep in report.said.sweeps:
        counts = [sweep.states.total(), *(sweep.states[state] for state in STATES)]
        rows.append([Value(sweep.name), *(Value(str(n), n) for n in counts)])
    head = [(name, "") for name in ("sweep", "planned", *STATES.values())]
    legend = "Points of the sweep. Running: or stopped on the way, which the next start takes up again."
    return Table("progress", "Progress", head, rows, legend, _unfinished(report)) if rows else None


def _unfinished(report: Report) -> list[str]:
    return [str(sweep) for sweep in report.said.sweeps if not sweep.is_done]


def differences(report: Report) -> Table:
    """The same, as differences to the full cache."""
    rows = [
        [Value(row.label), *(_difference(row.cells[c], c) for c in report.columns)]
        for row in report.rows
        if any(cell.comparison for cell in row.cells.values()) or row.first.state != "scored"
    ]
    compared = [c for row in report.rows for cell in row.cells.values() if (c := cell.comparison) and c.verdict in TOLD]
    notes = _unfinished(report)
    if len(compared) > 1:
        chance = len(compared) * (1 - LEVEL)
        notes.append(
            f"{len(compared)} comparisons: {'less than 1' if chance < 1 else f'about {chance:.0f}'} would fall outside "
            "noise by chance alone if no method changed anything."
        )
    return Table(
        "differences",
        "Differences to the full cache",
        [("method", ""), *_heads(report)],
        rows,
        DIFFERENCE_LEGEND,
        notes,
        [("", 1), *titles(report.columns)],
    )


@dataclass(frozen=True)
class Measure:
    """A column of the table of speed and memory: its names in kv_stats, its unit, and the factor to it."""

    title: str
    unit: str
    names: tuple[str, ...]
    factor: float
    higher_is_better: bool = False
    kind: str = "memory"


MEASURES = (
    Measure("TTFT", "ms", ("ttft_s",), 1e3, kind="time"),
    Measure("TPOT", "ms", ("tpot_s",), 1e3, kind="time"),
    Measure("throughput", "tokens/s", ("tokens_per_s",), 1, True, "time"),
    Measure("peak of prefill", "MiB", ("prefill_peak_bytes",), 2**-20),
    Measure("peak of decode", "MiB", ("decode_peak_bytes",), 2**-20),
    Measure("KV after prefill", "KiB", ("kv_bytes_prefill_mean",), 2**-10),
    Measure("KV at the end", "KiB", ("kv_bytes_decode_mean",), 2**-10),
    Measure("KV read by the last token", "KiB", ("kv_bytes_read_mean",), 2**-10),
    Measure("KV allocated", "KiB", ("kv_bytes_allocated_mean",), 2**-10),
    Measure("overhead", "KiB", ("overhead_bytes_mean",), 2**-10),
    Measure("answer", "tokens", ("answer_tokens_mean",), 1, kind="answers"),
)


def speed(report: Report) -> Table:
    """Time and memory: N/A where it was not measured."""
    measured = [m for m in MEASURES if any(row.measure(*m.names) for row in report.rows)]
    inflation = {row.label: _inflation(report, row) for row in report.rows}
    inflated = any(value is not None for value in inflation.values())
    head = [("method", ""), *((m.title, m.unit) for m in measured), *[("answer", "of full")] * inflated, ("run", "s")]
    kinds = [m.kind for m in measured] + ["answers"] * inflated
    groups = [("", 1), *((kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)), ("", 1)]
    notes = _unfinished(report)
    if nowhere := [m.title for m in MEASURES if m not in measured]:
        notes.append(f"Not measured in any run, and left out: {', '.join(nowhere)}.")
    rows = []
    for row in report.rows:
        if row.first.state != "scored":
            state = Value(row.first.state, tone=TONES.get(row.first.state, "bad"))
            rows.append([Value(row.label), state, *[Value(MISSING)] * (len(measured) + inflated)])
            continue
        values = [Value(row.label)]
        for measure in measured:
            found = row.measure(*measure.names)
            values.append(Value("N/A") if found is None else _measured(found, measure))
        if inflated:
            times = inflation[row.label]
            values.append(Value("N/A") if times is None else Value(f"x {times:.2f}", times))
        seconds = _seconds(row)
        values.append(Value("N/A") if seconds is None else Value(f"{seconds:,.1f}", seconds))
        rows.append(values)
    return Table("speed", "Time and memory", head, rows, SPEED_LEGEND, notes, groups)


def _inflation(report: Report, row: Row) -> float | None:
    """How many times as long as the full cache's a method's answers are: means, over the tasks that both generated
    as many answers of; None where there are none, or the row is the full cache."""
    base = next((r for r in report.rows if r.first.is_full_cache and r.first.model == row.first.model), None)
    if base is None or row.first.is_full_cache:
        return None

    def generated(of: Row) -> dict[str, float]:
        found = {task: run for run in of.runs for task in run.tasks if "answer_tokens_mean" in run.task_stats(task)}
        return {task: run.task_stats(task)["requests"] for task, run in found.items()}

    mine, full = generated(row), generated(base)
    common = [task for task in mine if mine[task] == full.get(task)]
    lengths = [of.stat("answer_tokens_mean", common) for of in (row, base)] if common else [None, None]
    return lengths[0] / lengths[1] if lengths[0] and lengths[1] else None


def every_number(report: Report) -> Table:
    """Long form: one line a method, task and score, with everything known about it."""
    names = (
        "model method label task metric filter higher_is_better state value stderr documents difference low high p "
        "verdict compared texts changed kept_fraction compressed_share settings"
    ).split()
    rows = []
    for row in report.rows:
        for task in dict.fromkeys(column.task for column in report.columns):
            run = row.run_of(task)
            if run is None:
                continue
            known = every_score(run, task) or [c for c in report.columns if c.task == task]
            for column in known:
                cell = row.cells.get(column) or _plain_cell(run.tasks.get(task) or {}, column)
                c = cell.comparison or Comparison(None)
                verdict = c.verdict if cell.comparison else ("base" if cell.is_base else "")
                values: list[Any] = [run.model, run.method, row.label, task, column.metric, column.filter]
                values += [column.higher_is_better, cell.state, cell.value, cell.stderr, cell.documents]
                values += [
                    c.difference,
                    c.low,
                    c.high,
                    c.p,
                    verdict,
                    c.documents or None,
                    c.clusters or None,
                    c.changed if c.documents else None,
                ]
                leaves = column.leaves or (task,)
                values += [row.kept(leaves), row.stat("compressed_share", leaves)]
                values.append(" ".join(f"{k}={v}" for k, v in run.settings.items()))
                rows.append([_plain(v) for v in values])
    return Table("all_numbers", "All numbers", [(name, "") for name in names], rows)


def _plain_cell(numbers: dict[str, Any], column: Column) -> Cell:
    value, stderr = numbers.get(column.key), numbers.get(f"{column.metric}_stderr,{column.filter}")
    return Cell("scored", value, stderr if is_number(stderr) else None)


def _plain(value: Any) -> Value:
    if value is None:
        return Value("")
    return Value(str(value), float(value)) if is_number(value) else Value(str(value))


def _heads(report: Report) -> list[tuple[str, str]]:
    out = []
    for column in report.columns:
        filter_ = (
            f" ({column.filter})"
            if sum(c.task == column.task and c.metric == column.metric for c in report.columns) > 1
            else ""
        )
        group = "mean of its tasks, " if column.leaves else ""
        out.append((column.task, f"{group}{column.metric}{filter_} {column.arrow}".strip()))
    return out


def number(value: float, like: float | None = None) -> str:
    """Digits that fit the size: 0.933, 12.34, 2,706."""
    size = abs(value if like is None else like)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"


def _score(cell: Cell, column: Column) -> Value:
    if cell.state != "scored" or cell.value is None:
        return Value(MISSING if cell.state == "missing" else cell.state, tone=TONES.get(cell.state, "bad"))
    text = number(cell.value) + (UNTOUCHED if cell.untouched else "")
    if cell.stderr is not None:
        text += f" ± {number(cell.stderr, cell.value)}"
    about = [f"{cell.documents} documents"] if cell.documents else []
    if cell.untouched:
        about.append("no request was compressed")
    if cell.unscored:
        about.append(f"{cell.unscored} documents without this score")
    return Value(text, cell.value, tone(cell, column), "; ".join(about), error=cell.stderr)


def tone(cell: Cell, column: Column) -> str:
    """How a cell looks: base, better, worse, noise, or nothing where that is not known."""
    if cell.is_base:
        return "base"
    c = cell.comparison
    if c is None or c.difference is None or c.verdict == "unknown" or column.higher_is_better is None:
        return ""
    if c.verdict != "outside noise":
        return "noise"
    return "better" if (c.difference > 0) == column.higher_is_better else "worse"


def _difference(cell: Cell, column: Column) -> Value:
    if cell.is_base:
        return Value("0", 0.0, "base", "the full cache itself")
    c = cell.comparison
    if cell.state != "scored" or c is None or c.difference is None:
        state = MISSING if cell.state in ("missing", "scored") else cell.state
        return Value(state, tone=TONES.get(cell.state, "bad"), title=c.reason if c else "")
    like = cell.value
    text = signed(c.difference, like)
    if c.verdict == "unknown" or c.p is None:
        return Value(text, c.difference, "", c.reason)
    lines, mark = "", f" {MARKS[c.verdict]}"
    if c.low is not None and c.high is not None and c.verdict != "too few documents":
        between = f"[{signed(c.low, like)}, {signed(c.high, like)}]"
        lines = f"{text}{mark}\n{between}"
        text += f" {between}"
    text += mark
    about = f"{c.verdict}; {c.changed} of {c.documents} {c.unit} differ; p = {c.p:.2g}"
    if c.clusters < c.documents:
        about += f"; {c.unit} about {c.clusters} texts"
    if c.left_out:
        about += f"; {c.left_out} documents left out"
    untouched = UNTOUCHED if cell.untouched else ""
    return Value(text + untouched, c.difference, tone(cell, column), about, lines.replace("\n", f"{untouched}\n"))


def signed(value: float, like: float | None) -> str:
    """A difference with its sign, as many digits as the number that it is one of."""
    text = number(abs(value), like)
    return text if float(text.replace(",", "")) == 0 else ("+" if value > 0 else "−") + text


def _measured(found: dict[str, float], measure: Measure) -> Value:
    value = found["median"] * measure.factor
    text = number(value) if measure.factor >= 1 else f"{value:,.0f}"
    lines = ""
    if "p10" in found and "p90" in found:
        low, high = (number(found[k] * measure.factor, value) for k in ("p10", "p90"))
        lines = f"{text}\n{low} to {high}"
        text += f" ({low} to {high})"
    return Value(text, value, title=f"{found['n']:.0f} requests" if "n" in found else "", lines=lines)


def _seconds(row: Row) -> float | None:
    found = [float(s) for run in row.runs if (s := run.results.get("total_evaluation_time_seconds")) is not None]
    return math.fsum(found) if found else None

"""What was run: how far, which models, tasks and versions, what failed and why, and the commands that run it again."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator
from html import escape

from kv_lm_eval import __version__
from kv_lm_eval.reporting import rerun
from kv_lm_eval.reporting.cells import Report, Row
from kv_lm_eval.stats import paired

MAX_FAILURES = 6
COPY = '<button type="button" class="js" data-copy>Copy</button>'


def section(report: Report) -> str:
    """The box."""
    facts = [*_counts(report), ("Models", _models(report)), ("Tasks", _tasks(report)), ("Versions", _versions(report))]
    method = (
        f"{paired.LEVEL:.0%}, Student's t with the jackknife's error over texts; within noise: the interval holds 0, "
        f"or 5 % or more of up to {paired.DRAWS:,} random swaps of the two runs' answers, text by text, give a "
        f"larger difference (seed {paired.SEED})"
    )
    listed = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in [*facts, ("Intervals", method)])
    return f'<div class="box"><dl>{listed}</dl>{_failures(report)}{_commands(report)}</div>'


def _counts(report: Report) -> Iterator[tuple[str, str]]:
    for sweep in report.said.sweeps:
        yield "Sweep", str(sweep).removeprefix("Sweep ")
    files = sum(run.state == "scored" for row in report.rows for run in row.runs)
    left_out = f", {len(report.damaged)} left out" if report.damaged else ""
    yield "Results", f"{files} results files read{left_out}"


def _models(report: Report) -> str:
    rows = Counter(row.first.model for row in report.rows)
    known: dict[str, dict[str, None]] = {model: {} for model in rows}
    for row in report.rows:
        for run in row.runs:
            dtype, sha = run.config.get("model_dtype"), run.config.get("model_sha")
            known[row.first.model] |= dict.fromkeys(
                [
                    *([str(dtype).removeprefix("torch.")] if dtype else []),
                    *([f"revision {str(sha)[:12]}"] if sha else []),
                ]
            )
    return "; ".join(f"{model} ({', '.join([*known[model], f'{n} rows'])})" for model, n in rows.items())


def _tasks(report: Report) -> str:
    out = []
    for task in dict.fromkeys(c.task for c in report.columns if not c.leaves):
        asked = sorted({n for row in report.rows if (n := row.asked(task)) is not None})
        count = "" if not asked else f" ({asked[0] if len(asked) == 1 else f'{asked[0]} to {asked[-1]}'} documents)"
        out.append(f"{task}{count}")
    return ", ".join(out)


def _versions(report: Report) -> str:
    versions: dict[str, set[str]] = {"python": {platform.python_version() + " (this report)"}}
    versions["kv-lm-eval"] = {f"{__version__} (this report)"}
    for row in report.rows:
        for run in row.runs:
            found = run.config.get("kv_versions") or run.point.get("versions") or {}
            more = {
                "lm-eval": run.results.get("lm_eval_version"),
                "transformers": run.results.get("transformers_version"),
            }
            for name, version in {**more, **found}.items():
                if version:
                    versions.setdefault(name, set()).add(str(version))
    return "; ".join(f"{name} {', '.join(sorted(found))}" for name, found in versions.items())


def _failures(report: Report) -> str:
    failed = [
        (row.label, run.state, _reason(run.point.get("error")))
        for row in report.rows
        for run in row.runs
        if run.state in ("failed", "OOM", "damaged")
    ]
    if not failed:
        return ""
    lines = [f"<li>{escape(label)}: {state}{escape(reason)}</li>" for label, state, reason in failed]
    more = ""
    if len(lines) > MAX_FAILURES:
        rest = "".join(lines[MAX_FAILURES:])
        more = f"<details><summary>{len(lines) - MAX_FAILURES} more</summary><ul>{rest}</ul></details>"
    return f'<p class="bad">Failed</p><ul class="failed">{"".join(lines[:MAX_FAILURES])}</ul>{more}'


def _reason(error: object) -> str:
    """The last line of an error."""
    lines = str(error or "").strip().splitlines()
    return f", {lines[-1]}" if lines else ""


def _commands(report: Report) -> str:
    return (
        "<details><summary>Commands that run it again, and settings</summary>"
        '<p class="soft">Without the places of their output. <button type="button" class="js" data-copy="all">'
        f"Copy all</button></p>{''.join(map(_command, report.rows))}</details>"
    )


def _command(row: Row) -> str:
    seen = dict.fromkeys(line for run in row.runs for line in rerun.lines(run))
    settings = ", ".join(f"{k}={v}" for k, v in row.first.settings.items())
    told = f'<p class="soft">Settings: {escape(settings)}</p>' if settings else ""
    return f"<h3>{escape(row.label)} {COPY}</h3><pre>\n{escape(chr(10).join(seen))}</pre>{told}"

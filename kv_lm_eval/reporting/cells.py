"""What a report is made of: rows of methods, columns of scores, a cell for each pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import answers, configuration
from kv_lm_eval.reporting.answers import Sample, SampleKey
from kv_lm_eval.reporting.believed import Said
from kv_lm_eval.reporting.run import UNCOMPRESSED, Run, digest, is_number
from kv_lm_eval.stats.paired import Comparison


@dataclass(frozen=True)
class Column:
    """One score of one task or group."""

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None = field(compare=False)
    leaves: tuple[str, ...] = field(default=(), compare=False)  # a group's tasks

    @property
    def key(self) -> str:
        """Its name in lm-eval's results."""
        return f"{self.metric},{self.filter}"

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]


@dataclass
class Cell:
    """One score: state is scored, missing, or that of a run without results (run.Run)."""

    state: str = "missing"
    value: float | None = None
    stderr: float | None = None
    documents: int | None = None
    untouched: bool = False  # a compression method that compressed none of the task's requests
    comparison: Comparison | None = None
    is_base: bool = False
    unscored: int = 0  # documents without this score, such as those that ran out of memory


@dataclass
class Row:
    """One method with its settings."""

    runs: list[Run]
    label: str = ""
    variant: dict[str, Any] = field(default_factory=dict)  # conditions that make it a row of its own
    cells: dict[Column, Cell] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)  # tasks whose answers were left out, with the reason
    _samples: dict[str, dict[str, dict[SampleKey, Sample]]] = field(default_factory=dict)

    @property
    def first(self) -> Run:
        """A run with results, where there is one: all have model, method and settings in common."""
        return next((run for run in self.runs if run.state == "scored"), self.runs[0])

    def run_of(self, task: str) -> Run | None:
        """The latest run with the task; one that was scored before one that was not."""
        having = [run for run in self.runs if task in run.tasks]
        return max(having, key=lambda run: (run.state == "scored", run.date), default=None)

    def samples(self, task: str, filter_: str) -> dict[SampleKey, Sample]:
        """The answers to a task, {} where they were not logged or are damaged; read once."""
        if task not in self._samples:
            run = self.run_of(task)
            try:
                self._samples[task] = answers.read(run, task) if run else {}
            except UserError as error:
                self._samples[task] = {}
                self.unread[task] = str(error)
        return self._samples[task].get(filter_, {})

    def asked(self, task: str) -> int | None:
        """How many documents a task was asked."""
        run = self.run_of(task)
        return run.documents(task) if run else None

    def answers_of(self, task: str) -> Path | None:
        """The file of a task's answers."""
        run = self.run_of(task)
        return run.samples_file(task) if run else None

    def stat(self, name: str, tasks: Sequence[str] = ()) -> float | None:
        """A mean of kv_stats over the requests of these tasks (all tasks where none is named), None if unknown."""
        wanted = list(tasks) or sorted({t for run in self.runs for t in run.stats.get("by_task") or {}})
        found = [run.task_stats(task) for task in wanted if (run := self.run_of(task))]
        known = [(s[name], s.get("requests", 0)) for s in found if is_number(s.get(name))]
        requests = sum(n for _, n in known)
        return sum(value * n for value, n in known) / requests if requests else None

    def kept(self, tasks: Sequence[str] = ()) -> float | None:
        """The share of pairs kept; 1 for a full cache that does not count them."""
        found = self.stat("kept_fraction_mean", tasks)
        return 1.0 if found is None and self.first.is_full_cache and self.first.state == "scored" else found

    def measure(self, *names: str) -> dict[str, float] | None:
        """A number of speed or memory with its spread, {"median", "p10", "p90", "n"}, of the run with most requests.

        None where it was not measured, which is never the same as 0.
        """
        for run in sorted(self.runs, key=lambda r: -r.stats.get("requests", 0)):
            for place in (run.stats, run.stats.get("efficiency") or {}):
                for name in names:
                    found = place.get(name)
                    if isinstance(found, dict) and is_number(found.get("median")):
                        return {k: v for k, v in found.items() if is_number(v)}
                    if is_number(found):
                        return {"median": float(found)}
        return None


@dataclass
class Report:
    """All of a report's numbers, and what was said of the files that they come from."""

    rows: list[Row]
    columns: list[Column]
    said: Said

    @property
    def notes(self) -> list[str]:
        """What a reader should know."""
        return self.said.notes

    @property
    def damaged(self) -> list[str]:
        """Files that were left out, each with the reason."""
        return self.said.damaged

    @property
    def models(self) -> list[str]:
        """Models, in order of appearance."""
        return list(dict.fromkeys(row.first.model for row in self.rows))

    def base_of(self, row: Row, column: Column) -> Row | None:
        """The full cache that a cell is compared with: same model, and as few other differences as possible."""
        full = [
            other
            for other in self.rows
            if other.first.is_full_cache
            and other.first.model == row.first.model
            and other.cells.get(column, Cell()).state == "scored"
        ]
        names = UNCOMPRESSED

        def distance(other: Row) -> tuple[int, int]:
            method = other.first.method
            return len(differences(row, other, column.task)), names.index(method) if method in names else len(names)

        return min(full, key=distance, default=None)


def every_score(run: Run, task: str) -> list[Column]:
    """All scores of a task in a run."""
    better = (run.results.get("higher_is_better") or {}).get(task) or {}
    leaves = tuple(run.subtasks(task))
    out = []
    for key, value in (run.tasks.get(task) or {}).items():
        metric, comma, filter_ = key.partition(",")
        if comma and not metric.endswith("_stderr") and is_number(value):
            out.append(Column(task, metric, filter_, better.get(metric), leaves))
    return out


def differences(row: Row, other: Row, task: str) -> list[str]:
    """Names of what was not the same when two rows ran a task, beside the method and its settings."""
    ours, theirs = row.run_of(task), other.run_of(task)
    if ours is None or theirs is None:
        return []
    both = set(ours.settings) & set(theirs.settings)  # how requests are run, which every method has
    mine, base = (
        {**configuration.of_run(run), **configuration.of_task(run, task), **{k: run.settings[k] for k in both}}
        for run in (ours, theirs)
    )
    return [name for name in dict.fromkeys([*mine, *base]) if digest(mine.get(name)) != digest(base.get(name))]


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

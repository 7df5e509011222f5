"""Runs become the rows of a table, tasks its columns; each cell is compared with the full cache on the same documents.

Runs with the same model, method, settings and conditions share a row, a task is taken from the latest of them. What
differs between the rows of a method becomes part of its label.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import load
from kv_lm_eval.reporting.load import Run, Sample, SampleKey, is_number
from kv_lm_eval.stats import blocks, clusters, intervals, paired
from kv_lm_eval.stats.paired import Comparison, Pair

# A task's main score, where it has several: the first of these, else the first it lists.
MAIN = ("score", "token_perplexity", "perplexity", "bits_per_byte")
BUDGETS = ("max_capacity_prompt", "cache_size", "keep_ratio", "compression_ratio")


@dataclass(frozen=True)
class Column:
    """One score of one task or group."""

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    leaves: tuple[str, ...] = ()  # a group's tasks

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
    """One score: state is scored, missing, OOM, failed or unfinished."""

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
    variant: dict[str, Any] = field(default_factory=dict)
    cells: dict[Column, Cell] = field(default_factory=dict)
    _samples: dict[str, dict[str, dict[SampleKey, Sample]]] = field(default_factory=dict)

    @property
    def first(self) -> Run:
        """Any of its runs: they have model, method and settings in common."""
        return self.runs[0]

    def run_of(self, task: str) -> Run | None:
        """The latest run with the task; one that was scored before one that was not."""
        having = [run for run in self.runs if task in run.tasks]
        return max(having, key=lambda run: (run.state == "scored", run.date), default=None)

    def samples(self, task: str, filter_: str) -> dict[SampleKey, Sample]:
        """The answers to a task, {} where they were not logged; read once."""
        if task not in self._samples:
            run = self.run_of(task)
            file = run.samples_file(task) if run else None
            self._samples[task] = load.samples(file) if file else {}
        return self._samples[task].get(filter_, {})

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
    """All of a report's numbers."""

    rows: list[Row]
    columns: list[Column]
    notes: list[str]

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
        names = load.UNCOMPRESSED

        def distance(other: Row) -> tuple[int, int]:
            method = other.first.method
            return _differences(row, other), names.index(method) if method in names else len(names)

        return min(full, key=distance, default=None)


def _differences(row: Row, other: Row) -> int:
    ours, theirs = {**row.first.conditions, **row.variant}, {**other.first.conditions, **other.variant}
    return sum(ours.get(k) != theirs.get(k) for k in {*ours, *theirs})


def report(runs: Sequence[Run], notes: Sequence[str] = (), metrics: Sequence[str] = ()) -> Report:
    """Rows, columns, cells and comparisons.

    Args:
        runs: as load.read gives them.
        notes: what the reader should know already.
        metrics: scores to show, where a task has them, in place of its main one.
    """
    said = list(notes)
    rows = _label(_rows(runs, said))
    out = Report(rows, _columns(rows, metrics), said)
    if unknown := set(metrics) - {column.metric for column in out.columns}:
        known = sorted(
            {c.metric for row in rows for run in row.runs for task in run.tasks for c in every_score(run, task)}
        )
        raise UserError(f"no task here has a score named {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    for row in rows:
        row.cells = {column: _cell(row, column) for column in out.columns}
    _compare_all(out)
    _warn(out)
    return out


# ---------------------------------------------------------------------------------------------- rows


def _rows(runs: Sequence[Run], notes: list[str]) -> list[Row]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        identity = [run.model, run.method, run.settings, run.conditions, run.point.get("name")]
        groups.setdefault(json.dumps(identity, sort_keys=True, default=str), []).append(run)
    rows: list[Row] = []
    for same in groups.values():
        variants: dict[str, list[Run]] = {}
        for run in same:
            asked = {"limit": run.limit, "num_fewshot": _shots(run), "documents": run.results.get("task_hashes")}
            key = json.dumps(asked if _conflict(same) else {}, sort_keys=True, default=str)
            variants.setdefault(key, []).append(run)
        for of_variant in variants.values():
            about = {"limit": of_variant[0].limit, "num_fewshot": _shots(of_variant[0])} if len(variants) > 1 else {}
            rows.append(Row(of_variant, variant=about))
            repeats = sum(len(r.tasks) for r in of_variant) - len({t for r in of_variant for t in r.tasks})
            if repeats and len(of_variant) > 1:
                notes.append(
                    f"{of_variant[0].method}: run more than once with the same settings; the latest one is shown."
                )
    methods = list(dict.fromkeys(row.first.method for row in rows))
    return sorted(
        rows, key=lambda row: (not row.first.is_full_cache, methods.index(row.first.method), _budget(row.first))
    )


def _budget(run: Run) -> float:
    """For the order of a method's rows; a sweep keeps its own order."""
    found = [run.settings[name] for name in BUDGETS if is_number(run.settings.get(name))]
    return 0.0 if run.point or not found else float(found[0])


def _conflict(runs: Sequence[Run]) -> bool:
    """Whether two of the runs asked a task for other documents or with another number of examples."""
    asked: dict[str, set[str]] = {}
    for run in runs:
        for task in run.tasks:
            documents = (run.results.get("task_hashes") or {}).get(task, run.limit)
            shots = (run.results.get("n-shot") or {}).get(task)
            asked.setdefault(task, set()).add(f"{documents} {shots}")
    return any(len(ways) > 1 for ways in asked.values())


def _shots(run: Run) -> Any:
    found = sorted(set((run.results.get("n-shot") or {}).values()))
    return found[0] if len(found) == 1 else found or None


def _label(rows: list[Row]) -> list[Row]:
    """Method and what differs between its rows; a sweep's own name where it has one."""
    labelled = []
    several_models = len({row.first.model for row in rows}) > 1
    for row in rows:
        run = row.first
        twins = [other for other in rows if other.first.method == run.method and other.first.model == run.model]
        differing = _differing([{**r.first.settings, **r.first.conditions, **r.variant} for r in twins])
        if not run.is_full_cache and not set(differing) & set(BUDGETS):
            differing = [name for name in BUDGETS if run.settings.get(name) is not None][:1] + differing
        own = {**run.settings, **run.conditions, **row.variant}
        parts = [run.method if run.method != "hf" else "full (hf)"]
        parts += [f"{name}={_short(own[name])}" for name in differing if own.get(name) is not None]
        label = re.sub(r"=[^\s=]*/", "=", str(run.point.get("name") or " ".join(parts)))  # a file without its folder
        labelled.append(replace(row, label=f"{run.model}: {label}" if several_models else label))
    for row in labelled:
        same = [other for other in labelled if other.label == row.label]
        if len(same) > 1:
            for i, other in enumerate(same, 1):
                other.label += f" #{i}"
    return labelled


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for s in settings for name in s))
    # Budgets first, the rest as configured; what only some list (an unfinished point lists few) does not differ.
    names.sort(key=lambda name: BUDGETS.index(name) if name in BUDGETS else len(BUDGETS))
    return [name for name in names if len({repr(s[name]) for s in settings if name in s}) > 1]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 24 else text[:10] + "…" + text[-10:]


# ---------------------------------------------------------------------------------------------- columns and cells


def _columns(rows: Sequence[Row], metrics: Sequence[str]) -> list[Column]:
    found: dict[str, list[Column]] = {}
    for row in rows:
        for run in row.runs:
            for task, numbers in run.tasks.items():
                if task not in found and (chosen := _chosen(run, task, numbers, metrics)):
                    found[task] = chosen
    tasks = [c for columns in found.values() for c in columns if not c.leaves]
    groups = [c for columns in found.values() for c in columns if c.leaves]
    return tasks + groups


def _chosen(run: Run, task: str, numbers: dict[str, Any], metrics: Sequence[str]) -> list[Column]:
    """A task's main score, or those asked for that it has."""
    known = every_score(run, task)
    if asked := [column for column in known if column.metric in metrics]:
        return asked
    cells = next((v for k, v in numbers.items() if k.startswith("cells,") and v), None)
    for name in ([cells[0]["primary"]] if cells else []) + list(MAIN):
        if preferred := [column for column in known if column.metric == name]:
            return preferred[:1]
    return known[:1]


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


def _cell(row: Row, column: Column) -> Cell:
    run = row.run_of(column.task)
    if run is None:
        return Cell()
    if run.state != "scored":
        return Cell(state=run.state)
    numbers = run.tasks[column.task]
    value, stderr = numbers.get(column.key), numbers.get(f"{column.metric}_stderr,{column.filter}")
    if not is_number(value):
        return Cell()
    leaves = column.leaves or (column.task,)
    counts = [(run.results.get("n-samples") or {}).get(leaf, {}).get("effective") for leaf in leaves]
    known = [n for n in counts if is_number(n)]
    compressed = [run.task_stats(leaf).get("compressed_share") for leaf in leaves]
    answers = {} if column.leaves else row.samples(column.task, column.filter)
    clustered = _standard_error(answers, column.metric, float(value))
    return Cell(
        state="scored",
        value=float(value),
        stderr=clustered if clustered is not None else float(stderr) if is_number(stderr) else None,
        documents=int(sum(known)) if known else None,
        untouched=not run.is_full_cache and bool(compressed) and all(share == 0 for share in compressed),
        unscored=sum(column.metric not in sample.metrics for sample in answers.values()),
    )


def _standard_error(answers: dict[SampleKey, Sample], metric: str, value: float) -> float | None:
    """Where documents share a text, of which lm-eval's own error knows nothing; None where they do not."""
    having = [s for s in answers.values() if metric in s.metrics]
    (of_document,) = clusters.label([[s.texts for s in having]])
    if not having or len(set(of_document.tolist())) == len(having):
        return None
    values = [s.metrics[metric] for s in having]
    aggregation = paired.aggregation_of([(values, value)])
    table = aggregation.table(values) if aggregation else None
    return None if aggregation is None or table is None else paired.standard_error(table, aggregation, of_document)


# ---------------------------------------------------------------------------------------------- comparisons


def _compare_all(out: Report) -> None:
    for column in out.columns:
        for row in out.rows:
            cell = row.cells[column]
            if cell.state != "scored":
                continue
            base = out.base_of(row, column)
            if base is row:
                cell.is_base = True
            elif base is not None:
                cell.comparison = _comparison(row, base, column)


def _comparison(row: Row, base: Row, column: Column) -> Comparison:
    ours, theirs = row.cells[column].value, base.cells[column].value
    assert ours is not None and theirs is not None
    pairs, left_out, reasons = [], 0, []
    leaves = [replace(column, task=leaf, leaves=()) for leaf in column.leaves or (column.task,)]
    common = [_in_common(row, base, leaf) for leaf in leaves]
    labels = clusters.label([[ours[key].texts for key in keys] for ours, _, keys in common])
    for leaf, (ours_of, theirs_of, keys), of_leaf in zip(leaves, common, labels, strict=True):
        pair, reason = _pair(row, base, leaf, ours_of, theirs_of, keys, of_leaf)
        left_out += len(ours_of) + len(theirs_of) - 2 * len(keys) if keys else 0
        if pair:
            pairs.append(pair)
        else:
            reasons.append(f"{leaf.task}: {reason}" if column.leaves else reason)
    if reasons:
        refused = "in common" in reasons[0]
        return Comparison(difference=None if refused else ours - theirs, reason=reasons[0])
    if not column.leaves:
        return paired.compare(pairs, left_out=left_out, unit=pairs[0].unit)
    weights = _weights(pairs, ours, theirs) if not left_out else None
    if weights is None:
        return Comparison(ours - theirs, reason="how the group averages its tasks is not known")
    return paired.compare(pairs, weights)


Samples = dict[SampleKey, Sample]


def _in_common(row: Row, base: Row, column: Column) -> tuple[Samples, Samples, list[SampleKey]]:
    """Both runs' documents that have the score, and the keys of those that both have."""
    sides = [side.samples(column.task, column.filter) for side in (row, base)]
    ours, theirs = ({key: s for key, s in side.items() if column.metric in s.metrics} for side in sides)
    return ours, theirs, [key for key in ours if key in theirs]


def _pair(
    row: Row,
    base: Row,
    column: Column,
    ours: Samples,
    theirs: Samples,
    common: Sequence[SampleKey],
    of_document: NDArray[np.int64],
) -> tuple[Pair | None, str]:
    """Both runs' values on their common documents, or why it cannot be."""
    if not row.samples(column.task, column.filter) or not base.samples(column.task, column.filter):
        return None, "no answers logged (--log_samples)"
    if not common:
        return None, "no document in common"
    sides = []
    for which, samples in ((row, ours), (base, theirs)):
        run = which.run_of(column.task)
        reported = run.tasks[column.task].get(column.key) if run else None
        if is_number(reported):
            sides.append(([s.metrics[column.metric] for s in samples.values()], reported))
    aggregation = paired.aggregation_of(sides) if len(sides) == 2 else None
    if aggregation is None:
        return None, f"how {column.metric} is made of single documents is not known"
    if aggregation.weighted and len(set(of_document.tolist())) < intervals.FEWEST:
        if in_blocks := _in_blocks(ours, theirs, common, column.metric):
            return Pair(in_blocks[0], in_blocks[1], aggregation, unit=in_blocks[2]), ""
    mine, other = (aggregation.table([side[key].metrics[column.metric] for key in common]) for side in (ours, theirs))
    if mine is None or other is None:
        return None, f"the two runs score {column.metric} in different ways"
    return Pair(mine, other, aggregation, of_document), ""


def _in_blocks(
    ours: Samples, theirs: Samples, common: Sequence[SampleKey], metric: str
) -> tuple[paired.Array, paired.Array, str] | None:
    """Few long texts, with every token's log-likelihood recorded: blocks of tokens in place of documents; and their
    name.

    None where that is not so: where the score is not per token, or the two runs scored other tokens.
    """
    sides: list[list[paired.Array]] = []
    for side in (ours, theirs):
        for key in common:
            total, tokens = side[key].metrics[metric]
            short = side[key].blocks
            if not short or tokens != sum(n for _, n in short):
                return None
            if abs(total - sum(ll for ll, _ in short)) > 1e-4 * abs(total):
                return None
        sides.append([np.array(side[key].blocks, dtype=float) for key in common])
    if any(not np.array_equal(a[:, 1:], b[:, 1:]) for a, b in zip(*sides, strict=True)):
        return None
    size = blocks.size_for(int(sum(a[:, 1].sum() for a in sides[0])))
    tables = [np.concatenate([_longer(a, max(1, size // load.BLOCK)) for a in side]) for side in sides]
    return tables[0], tables[1], f"blocks of {size} tokens"


def _longer(short: paired.Array, count: int) -> paired.Array:
    """Rows put together, about `count` at a time, all alike."""
    return np.stack([part.sum(axis=0) for part in np.array_split(short, max(1, round(len(short) / count)))])


def _weights(pairs: Sequence[Pair], ours: float, theirs: float) -> list[float] | None:
    """A group's weights: its tasks count the same, or by documents; whichever gives the numbers lm-eval reported."""
    sizes = [len(pair.ours) for pair in pairs]
    for weights in ([1 / len(pairs)] * len(pairs), [n / sum(sizes) for n in sizes]):
        made = [
            sum(w * p.aggregation.value(side) for w, p, side in zip(weights, pairs, sides, strict=True))
            for sides in ([p.ours for p in pairs], [p.base for p in pairs])
        ]
        if all(
            abs(m - reported) <= 1e-6 * max(1.0, abs(reported))
            for m, reported in zip(made, (ours, theirs), strict=True)
        ):
            return weights
    return None


def _warn(out: Report) -> None:
    """What a reader would otherwise take for a result."""
    for row in out.rows:
        run = row.first
        if run.state in ("failed", "OOM"):
            error = str(run.point.get("error") or "no reason recorded").strip().splitlines()[-1]
            out.notes.append(f"{row.label}: {run.state}. {error[:300]}")
        untouched = [c.task for c, cell in row.cells.items() if cell.untouched]
        if untouched:
            out.notes.append(
                f"{row.label} compressed no request of {_some(untouched)}: its score is the full cache's. Longer "
                "prompts or a smaller budget are needed to say anything about the method."
            )
        for column, cell in row.cells.items():
            if cell.unscored and column.metric != "floor":
                out.notes.append(f"{row.label}, {column.task}: {cell.unscored} documents have no {column.metric}.")
            if (c := cell.comparison) is None:
                continue
            if c.left_out:
                out.notes.append(
                    f"{row.label}, {column.task}: asked other documents than the full cache; compared on the "
                    f"{c.documents} {c.unit} they have in common ({c.left_out} documents left out). "
                    "The scores themselves are not comparable."
                )
            if c.verdict == "too few documents" and c.clusters < c.documents:
                out.notes.append(
                    f"{row.label}, {column.task}: its {c.documents} {c.unit} are about {c.clusters} texts only, too "
                    "few to tell a difference from noise."
                )
            if c.reason:
                out.notes.append(f"{row.label}, {column.task}: no interval, {c.reason}.")
    out.notes += _seeds(out)
    for model in out.models:
        if not any(row.first.is_full_cache and row.first.model == model for row in out.rows):
            out.notes.append(f"{model}: no run with the full cache (method=full), so there is nothing to compare with.")
    for task in dict.fromkeys(column.task for column in out.columns):
        versions = {
            str((r.results.get("versions") or {}).get(task))
            for row in out.rows
            if (r := row.run_of(task)) and r.results
        }
        if len(versions) > 1:
            out.notes.append(f"{task} was run in several versions of the task: {', '.join(sorted(versions))}.")
        prompts = _changed_prompts(out, task)
        if prompts:
            out.notes.append(f"{task}: {prompts} documents were asked with other prompts than under the full cache.")


def _seeds(out: Report) -> list[str]:
    """What a method that draws at random owes to its draw: the spread over its seeds, or that there was one alone."""
    groups: dict[str, list[Row]] = {}
    for row in out.rows:
        settings = row.first.settings
        if "seed" in settings and settings.get("strategy", "random") == "random":
            rest = {k: v for k, v in settings.items() if k != "seed"}
            identity = [row.first.model, row.first.method, rest, row.first.conditions, row.variant]
            groups.setdefault(json.dumps(identity, sort_keys=True, default=str), []).append(row)
    notes = []
    for rows in groups.values():
        if len({repr(row.first.settings["seed"]) for row in rows}) == 1:
            notes.append(
                f"{rows[0].label} draws at random and was run with one seed: another seed, another score, so that its "
                "place among the others is the draw's too. Run several seeds."
            )
            continue
        for column in out.columns:
            found = [c.value for row in rows if (c := row.cells[column]).state == "scored" and c.value is not None]
            if len(found) > 1:
                mean = sum(found) / len(found)
                notes.append(
                    f"{rows[0].first.method}, {column.task}: {len(found)} seeds from {min(found):.4g} to "
                    f"{max(found):.4g}, mean {mean:.4g} ({', '.join(row.label for row in rows)})."
                )
    return notes


def _changed_prompts(out: Report, task: str) -> int:
    changed = set()
    for column in (c for c in out.columns if c.task == task and not c.leaves):
        for row in out.rows:
            base = out.base_of(row, column)
            if base is None or base is row:
                continue
            theirs = base.samples(task, column.filter)
            for key, sample in row.samples(task, column.filter).items():
                if key in theirs and theirs[key].prompt_hash != sample.prompt_hash:
                    changed.add(key)
    return len(changed)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

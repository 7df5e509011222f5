"""A report's numbers: which score stands where, how it compares with the full cache's, and what there is to say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import answers, configuration, grouping, load
from kv_lm_eval.reporting.answers import Sample, SampleKey
from kv_lm_eval.reporting.cells import Cell, Column, Report, Row, differences, some
from kv_lm_eval.reporting.load import Run, Said, is_number
from kv_lm_eval.stats import blocks, clusters, intervals, paired
from kv_lm_eval.stats.paired import Comparison, Pair

# A task's main score, where it has several: the first of these, else the first it lists.
NOT_COMPARABLE = "not comparable, "
MAIN = ("score", "token_perplexity", "perplexity", "bits_per_byte")


def report(runs: Sequence[Run], said: Said | None = None, metrics: Sequence[str] = ()) -> Report:
    """Rows, columns, cells and comparisons.

    Args:
        runs: as load.read gives them.
        said: what the reader should know already; more is added to it.
        metrics: scores to show, where a task has them, in place of its main one.
    """
    said = said or Said()
    below = {name: leaves for run in runs for name in run.tasks if (leaves := run.subtasks(name))}
    runs = [run if run.state == "scored" else _covering(run, below) for run in runs]
    rows = grouping.label(grouping.group(runs, said.notes))
    out = Report(rows, _columns(rows, metrics, below), said)
    if unknown := set(metrics) - {column.metric for column in out.columns}:
        known = sorted(
            {c.metric for row in rows for run in row.runs for task in run.tasks for c in every_score(run, task)}
        )
        raise UserError(f"no task here has a score named {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    for row in rows:
        row.cells = {column: _cell(row, column) for column in out.columns}
    _compare_all(out)
    said.damaged += dict.fromkeys(text for row in rows for text in row.unread.values())
    _warn(out)
    return out


def _covering(run: Run, below: dict[str, list[str]]) -> Run:
    return replace(run, covers=tuple(dict.fromkeys(leaf for task in run.tasks for leaf in below.get(task, ()))))


# ---------------------------------------------------------------------------------------------- columns and cells


def _columns(rows: Sequence[Row], metrics: Sequence[str], below: dict[str, list[str]]) -> list[Column]:
    found: dict[str, list[Column]] = {}
    for row in rows:
        for run in row.runs:
            for task, numbers in run.tasks.items():
                if task not in found and (chosen := _chosen(run, task, numbers, metrics)):
                    found[task] = chosen
    tasks = [c for columns in found.values() for c in columns if not c.leaves]
    groups = [c for columns in found.values() for c in columns if c.leaves]
    ahead = {t: None for row in rows for run in row.runs if run.state != "scored" for t in run.tasks if t not in below}
    return tasks + [Column(task, "no score yet", "", None) for task in ahead if task not in found] + groups


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
    found = {} if column.leaves else row.samples(column.task, column.filter)
    clustered = _standard_error(found, column.metric, float(value))
    return Cell(
        state="scored",
        value=float(value),
        stderr=clustered if clustered is not None else float(stderr) if is_number(stderr) else None,
        documents=int(sum(known)) if known else None,
        untouched=not run.is_full_cache and bool(compressed) and all(share == 0 for share in compressed),
        unscored=sum(column.metric not in sample.metrics for sample in found.values()),
    )


def _standard_error(found: dict[SampleKey, Sample], metric: str, value: float) -> float | None:
    """Where documents share a text, of which lm-eval's own error knows nothing; None where they do not."""
    having = [s for s in found.values() if metric in s.metrics]
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
        refused = NOT_COMPARABLE in reasons[0]
        return Comparison(difference=None if refused else ours - theirs, reason=reasons[0])
    if not column.leaves:
        return paired.compare(pairs, left_out=left_out, unit=pairs[0].unit)
    weights = _weights(pairs, ours, theirs) if not left_out else None
    if weights is None:
        return Comparison(ours - theirs, reason="how the group averages its tasks is not known")
    return paired.compare(pairs, weights)


Samples = dict[SampleKey, Sample]


def _in_common(row: Row, base: Row, column: Column) -> tuple[Samples, Samples, list[SampleKey]]:
    """Both runs' documents that have the score, and the keys of those that both have with the same prompt."""
    sides = [side.samples(column.task, column.filter) for side in (row, base)]
    ours, theirs = ({key: s for key, s in side.items() if column.metric in s.metrics} for side in sides)
    same = [key for key in ours if key in theirs and ours[key].prompt_hash == theirs[key].prompt_hash]
    return ours, theirs, same


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
    if reason := _other_task(row, base, column.task):
        return None, NOT_COMPARABLE + reason
    if not row.samples(column.task, column.filter) or not base.samples(column.task, column.filter):
        if row.asked(column.task) != base.asked(column.task):
            return None, NOT_COMPARABLE + "another number of documents, and no answers to match them by"
        damaged = any(column.task in side.unread for side in (row, base))
        return None, "the answers were left out" if damaged else "no answers logged (--log_samples)"
    if not common:
        both = any(key in theirs for key in ours)
        return None, NOT_COMPARABLE + ("asked with other prompts" if both else "no document in common")
    sides = []
    for which, samples in ((row, ours), (base, theirs)):
        run = which.run_of(column.task)
        reported = run.tasks[column.task].get(column.key) if run else None
        if is_number(reported):
            sides.append(([s.metrics[column.metric] for s in samples.values()], reported))
    aggregation = paired.aggregation_of(sides) if len(sides) == 2 else None
    if aggregation is None:
        runs = [run for side in (row, base) if (run := side.run_of(column.task))]
        sources = " or ".join(f"{run.results_file} and {run.samples_file(column.task)}" for run in runs)
        return (
            None,
            f"how {column.metric} is made of single documents is not known, or one of these is damaged: {sources}",
        )
    if aggregation.weighted and len(set(of_document.tolist())) < intervals.FEWEST:
        if in_blocks := _in_blocks(ours, theirs, common, column.metric):
            return Pair(in_blocks[0], in_blocks[1], aggregation, unit=in_blocks[2]), ""
    mine, other = (aggregation.table([side[key].metrics[column.metric] for key in common]) for side in (ours, theirs))
    if mine is None or other is None:
        return None, f"the two runs score {column.metric} in different ways"
    return Pair(mine, other, aggregation, of_document), ""


def _other_task(row: Row, base: Row, task: str) -> str:
    """Whether two rows ran different versions of a task, in words."""
    runs = [run for side in (row, base) if (run := side.run_of(task))]
    if len(runs) < 2:
        return f"{task} was run in one of the two alone"
    ours, theirs = (str((run.results.get("versions") or {}).get(task)) for run in runs)
    files = " and ".join(str(run.results_file) for run in runs)
    return "" if ours == theirs else f"version {ours} of the task against {theirs} ({files})"


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
            if not answers.adds_up(side[key].blocks, side[key].metrics[metric]):
                return None
        sides.append([np.array(side[key].blocks, dtype=float) for key in common])
    if any(not np.array_equal(a[:, 1:], b[:, 1:]) for a, b in zip(*sides, strict=True)):
        return None
    size = blocks.size_for(int(sum(a[:, 1].sum() for a in sides[0])))
    tables = [np.concatenate([_longer(a, max(1, size // answers.BLOCK)) for a in side]) for side in sides]
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
    _warn_of_sweeps(out)
    _warn_of_missing_scores(out)
    for row in out.rows:
        for run in row.runs:
            if run.state in ("failed", "OOM"):
                error = str(run.point.get("error") or "no reason recorded").strip().splitlines()[-1]
                out.notes.append(f"{row.label}: {run.state}. {error[:300]}")
        if alike := _not_alike(out, row):
            out.notes.append(f"{row.label}: not run as the full cache that it is compared with: {alike}.")
        untouched = [c.task for c, cell in row.cells.items() if cell.untouched]
        if untouched:
            out.notes.append(
                f"{row.label} compressed no request of {some(untouched)}: its score is the full cache's. Longer "
                "prompts or a smaller budget are needed to say anything about the method."
            )
        for column, cell in row.cells.items():
            if cell.unscored and column.metric != "floor":
                out.notes.append(
                    f"{row.label}, {column.task}: {cell.unscored} documents have no {column.metric} "
                    f"({row.answers_of(column.task)})."
                )
            if (c := cell.comparison) is None:
                continue
            if c.left_out:
                out.notes.append(
                    f"{row.label}, {column.task}: asked other documents or prompts than the full cache; compared on "
                    f"the {c.documents} {c.unit} they have in common ({c.left_out} documents left out). "
                    "The scores themselves are not comparable."
                )
            if c.verdict == "too few documents" and c.clusters < c.documents:
                out.notes.append(
                    f"{row.label}, {column.task}: its {c.documents} {c.unit} are about {c.clusters} texts only, too "
                    "few to tell a difference from noise."
                )
            if (sides := _tokens_of_one(out, row, column)) is not None:
                out.notes.append(f"{row.label}, {column.task}: tokens are recorded in only one of {sides}.")
            if c.reason:
                lacks = "no interval" if c.difference is not None else "no difference"
                out.notes.append(f"{row.label}, {column.task}: {lacks}, {c.reason}.")
    out.said.notes += _seeds(out)
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
            out.notes.append(
                f"{task}: {prompts} documents were asked with other prompts than under the full cache, "
                "which are not compared."
            )


def _tokens_of_one(out: Report, row: Row, column: Column) -> str | None:
    """Two files of answers, where one records the tokens by which long texts are compared and the other does not."""
    base = out.base_of(row, column)
    if base is None or column.leaves:
        return None
    sides = [side.samples(column.task, column.filter).values() for side in (row, base)]
    if not all(sides) or len({any(sample.blocks for sample in side) for side in sides}) == 1:
        return None
    return f"{row.answers_of(column.task)} and {base.answers_of(column.task)}"


def _warn_of_sweeps(out: Report) -> None:
    unfinished = [str(sweep) for sweep in out.said.sweeps if not sweep.is_done]
    out.said.notes[:0] = [f"{text} These tables are not complete." for text in unfinished]


def _warn_of_missing_scores(out: Report) -> None:
    """A score that other runs of the task have: a file that lost it would look like one that never had it."""
    runs = [run for row in out.rows for run in row.runs if run.state == "scored"]
    first: dict[str, dict[Column, tuple[Column, Run]]] = {}
    for run in runs:
        for task in run.tasks:
            for column in every_score(run, task):
                first.setdefault(task, {}).setdefault(column, (column, run))
    for run in runs:
        for task in first:
            if task not in run.tasks and not run.subtasks(task):
                continue
            mine = every_score(run, task)
            if lacking := [column.metric for column in first[task] if column not in mine]:
                out.notes.append(f"{run.results_file}: {task} has no {', '.join(lacking)}, which other runs have.")
            out.said.notes += (text for column in mine for text in _disagreement(run, column, *first[task][column]))


def _disagreement(run: Run, column: Column, first: Column, other: Run) -> Iterator[str]:
    """Where a run says other things of a score than the first run that has it."""
    files = f"{run.results_file} and {other.results_file}, {column.task}"
    if first.higher_is_better != column.higher_is_better:
        yield f"{files}: they do not agree on whether more or less {column.metric} is better."
    if set(first.leaves) != set(column.leaves):
        yield f"{files}: they do not hold the same tasks."
    directions = (run.results.get("higher_is_better") or {}).get(column.task) or {}
    if run is other and column.metric not in directions:
        yield f"{run.results_file}: {column.task} does not say whether more or less {column.metric} is better."


def _not_alike(out: Report, row: Row) -> str:
    """What else differs from the full cache, with both values, and the first task of which it is so."""
    for column, cell in row.cells.items():
        base = out.base_of(row, column) if cell.comparison else None
        if base is None or (names := [n for n in differences(row, base, column.task) if n != "limit"]) == []:
            continue
        ours, theirs = row.run_of(column.task), base.run_of(column.task)
        assert ours is not None and theirs is not None
        told = []
        for name in names:
            values = [
                {**run.settings, **configuration.of_run(run), **configuration.of_task(run, column.task)}.get(name)
                for run in (ours, theirs)
            ]
            mine, base_value = ("none" if value is None else configuration.shown(value) for value in values)
            told.append(f"{name}={mine} against {base_value}")
        return f"{', '.join(told)} ({column.task})"
    return ""


def _seeds(out: Report) -> list[str]:
    """What a method that draws at random owes to its draw: the spread over its seeds, or that there was one alone."""
    groups: dict[str, list[Row]] = {}
    for row in out.rows:
        settings = row.first.settings
        if "seed" in settings and settings.get("strategy", "random") == "random":
            rest = {k: v for k, v in settings.items() if k != "seed"}
            identity = [row.first.model, row.first.method, rest, row.variant]
            groups.setdefault(load.digest(identity), []).append(row)
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

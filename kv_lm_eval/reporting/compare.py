"""Two rows on the documents that they have in common: a task's difference, and a group's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kv_lm_eval.reporting import answers
from kv_lm_eval.reporting.answers import Sample, SampleKey
from kv_lm_eval.reporting.cells import Column, Row
from kv_lm_eval.reporting.run import is_number
from kv_lm_eval.stats import blocks, clusters, intervals, paired
from kv_lm_eval.stats.paired import Comparison, Pair

NOT_COMPARABLE = "not comparable, "
Samples = dict[SampleKey, Sample]


def rows(row: Row, base: Row, column: Column) -> Comparison:
    """A row's score minus another's, over the documents that both were asked with the same prompt."""
    ours, theirs = row.cells[column].value, base.cells[column].value
    assert ours is not None and theirs is not None
    pairs, left_out, reasons = [], 0, []
    leaves = [replace(column, task=leaf, leaves=()) for leaf in column.leaves or (column.task,)]
    common = [in_common(row, base, leaf) for leaf in leaves]
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


def in_common(row: Row, base: Row, column: Column) -> tuple[Samples, Samples, list[SampleKey]]:
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
    if any(task in run.answers for run in runs):  # a file of answers alone: documents and prompts tell
        return ""
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

"""Two runs on the same documents: what B changes against A, whether it is noise, and which answers flip.

    kv-lm-eval compare A B [--metrics acc,f1] [--flips 20]

A and B are folders with the results of one run each (--output_path, with --log_samples), or results_*.json files, or
samples_*.jsonl files. Compared are the documents that both were asked with the same prompt. Each difference, B minus
A, has a 95 % interval in which all documents about one text are one observation, and the p of swapping the two runs'
answers at random; where every score is 0 or 1, McNemar's exact test stands beside it. Any two runs may be compared:
two methods, two models, two versions of the code.

Prints one paragraph a score; the last line is one JSON document. Exit status: 0 compared, 2 the two have nothing in
common, or a file cannot be believed.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kv_lm_eval import console, files
from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import believed, cells, compare, flips, grouping, load, rows, tables
from kv_lm_eval.reporting.believed import Said
from kv_lm_eval.reporting.cells import Column, Row
from kv_lm_eval.reporting.flips import Changes
from kv_lm_eval.reporting.run import Run, is_number
from kv_lm_eval.stats.paired import Comparison

SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<date>[0-9T.:-]+)\.jsonl")
SHOWN = 60  # characters of an answer


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, compares, prints; returns the exit status."""
    return console.command("compare", lambda: _main(argv), lists=True)


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="kv-lm-eval compare", description=__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="the run compared with, such as the full cache")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--metrics", default="", help="scores, by comma, in place of each task's main one")
    parser.add_argument("--flips", type=int, default=10, help="documents listed for each score (default 10)")
    args = parser.parse_args(argv)
    if args.flips < 0:
        raise UserError(f"--flips {args.flips} is negative; it counts documents, 0 or more")
    if args.a.resolve() == args.b.resolve():
        raise UserError(f"A and B are both {args.a}: give two runs")
    named = [match["task"] for path in (args.a, args.b) if (match := SAMPLES.fullmatch(path.name))]
    a, b = (read(path, [*named, "the task"][0]) for path in (args.a, args.b))
    columns = in_common(a, b, [name for name in args.metrics.split(",") if name], args)
    for name, row, path in (("A", a, args.a), ("B", b, args.b)):
        row.cells = {column: rows.cell(row, column) for column in columns}
        print(f"{name}  {row.label or row.first.method}  ({path})")
    found = []
    for column in columns:
        difference, flipped = compare.rows(b, a, column), None if column.leaves else flips.of(a, b, column)
        print()
        print("\n".join(paragraph(a, b, column, difference, flipped, args.flips)))
        found.append(document(a, b, column, difference, flipped))
    if unread := {**a.unread, **b.unread}:
        raise UserError(next(iter(unread.values())))
    print(json.dumps({"a": str(args.a), "b": str(args.b), "scores": found}))
    return 0


# ---------------------------------------------------------------------------------------------- what is read


def read(path: Path, task: str) -> Row:
    """The one run that a path stands for.

    Args:
        task: whose answers a file holds that does not say so in its name.

    Raises:
        UserError: there is none, there are several, or it cannot be believed.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder; give a results folder, or a results or samples file")
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".jsonl":
        return Row([_of_answers(path, task)], label=path.name)
    if path.suffix == ".json":
        return Row([_of_results(path)])
    raise UserError(f"{path}: is neither a results_*.json nor a samples_*.jsonl file")


def _of_folder(folder: Path) -> Row:
    runs, said = load.read(folder)
    for text in said.damaged:
        print(f"left out: {text}", file=sys.stderr)
    found = grouping.label(grouping.group([run for run in runs if run.state == "scored"], said.notes))
    if not found:
        raise UserError(f"{folder}: no run in it has results; {' '.join(said.damaged)}".rstrip("; "))
    if len(found) > 1:
        names = cells.some([f"{row.label}: {row.first.results_file}" for row in found])
        raise UserError(
            f"{folder} holds {len(found)} runs ({names}); give the results file of one, or see `kv-lm-eval report`"
        )
    return found[0]


def _of_results(file: Path) -> Run:
    said = Said()
    results = believed.results_of(file, said)
    if results is None:
        raise UserError(said.damaged[-1])
    return Run(results, file)


def _of_answers(file: Path, task: str) -> Run:
    """A samples file with the results file that it belongs to; alone where that is not there, its scores are means."""
    named = SAMPLES.fullmatch(file.name)
    task = named["task"] if named else task
    if named and (results := file.with_name(f"results_{named['date']}.json")).is_file():
        run = _of_results(results)
        only = {task: run.tasks[task]} if task in run.tasks else {}
        return Run({**run.results, "results": only}, results)
    scores: dict[str, list[float]] = {}
    for number, record in files.read_jsonl(file):
        metrics = record.get("metrics") if isinstance(record, dict) else None
        if not isinstance(metrics, list) or not all(isinstance(name, str) for name in metrics):
            raise UserError(f"{file}, line {number}: is no answer of lm-eval's (--log_samples): it names no metrics")
        for name in metrics:
            value = record.get(name)
            if isinstance(value, bool) or is_number(value):
                scores.setdefault(f"{name},{record.get('filter', 'none')}", []).append(float(value))
            else:
                scores.setdefault(f"{name},{record.get('filter', 'none')}", [])
    if not scores:
        raise UserError(f"{file}: holds no score")
    means: dict[str, Any] = {key: statistics.fmean(values) if values else "N/A" for key, values in scores.items()}
    return Run({"results": {task: means}, "model_name": file.name}, file, answers={task: file})


def in_common(a: Row, b: Row, metrics: Sequence[str], args: Any) -> list[Column]:
    """The scores that both runs have: each common task's main one, or those asked for.

    Raises:
        UserError: there are none.
    """
    tasks = [{task: run for run in row.runs for task in run.tasks} for row in (a, b)]
    both = [task for task in tasks[0] if task in tasks[1]]
    if not both:
        asked = [", ".join(of_side) or "none" for of_side in tasks]
        raise UserError(f"{args.a} and {args.b} have no task in common: {asked[0]} against {asked[1]}")
    columns, known = [], set[str]()
    for task in both:
        first, second = (cells.every_score(run, task) for run in (_run(a, task), _run(b, task)))
        known |= {column.metric for column in first if column in second}
        wanted = rows.chosen(_run(a, task), task, _run(a, task).tasks[task], metrics)
        columns += [column for column in wanted if column in second and (not metrics or column.metric in metrics)]
    if unknown := [name for name in metrics if name not in known]:
        raise UserError(f"--metrics {unknown[0]}: both runs have {', '.join(sorted(known)) or 'no score'} in common")
    if not columns:
        raise UserError(f"{args.a} and {args.b} have no score in common in {', '.join(both)}")
    return columns


def _run(row: Row, task: str) -> Run:
    run = row.run_of(task)
    assert run is not None
    return run


# ---------------------------------------------------------------------------------------------- what is said


def paragraph(a: Row, b: Row, column: Column, c: Comparison, flipped: Changes | None, most: int) -> Iterator[str]:
    """A score's lines."""
    ours, theirs = a.cells[column].value, b.cells[column].value
    assert ours is not None and theirs is not None
    yield f"{column.task}  {column.metric} {column.arrow}".rstrip()
    yield f"  A {tables.number(ours)}   B {tables.number(theirs)}"
    if c.difference is None:
        yield f"  no difference: {c.reason}"
        return
    if c.verdict == "identical":
        yield f"  the same on all {c.documents} {c.unit}"
        return
    line = f"  B - A: {tables.signed(c.difference, theirs)}"
    if c.low is not None and c.high is not None:
        line += f" [{tables.signed(c.low, theirs)}, {tables.signed(c.high, theirs)}]"
    yield f"{line}, {c.verdict}" + (f" (p = {c.p:.2g})" if c.p is not None else "")
    if c.reason:
        yield f"  no interval: {c.reason}"
    if c.documents:
        about = f" about {c.clusters} texts" if c.clusters < c.documents else ""
        left = f"; {c.left_out} left out, which one of the two lacks or was asked otherwise" if c.left_out else ""
        yield f"  {c.changed} of {c.documents} {c.unit}{about} have another score{left}"
    if flipped is None:
        return
    if (test := flipped.test) is not None:
        alone = f"  right in A alone {test.right_to_wrong}, in B alone {test.wrong_to_right}"
        caveat = ", which takes documents about one text for several" if c.clusters < c.documents else ""
        yield f"{alone}: McNemar's exact p = {test.p:.2g}{caveat}"
    for flip in flipped.changed[:most]:
        change = ("A right, B wrong" if flip.change < 0 else "A wrong, B right") if test else ""
        change = change or f"{tables.signed(flip.change, None)}"
        yield f"    document {flip.a.doc_id}: {change}; A {_short(flip.a.answer)}, B {_short(flip.b.answer)}"
    if len(flipped.changed) > most:
        yield f"    and {len(flipped.changed) - most} more (--flips {len(flipped.changed)})"


def _short(answer: str) -> str:
    text = " ".join(answer.split())
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")


def document(a: Row, b: Row, column: Column, c: Comparison, flipped: Changes | None) -> dict[str, Any]:
    """The same for the JSON document, every flip in it."""
    found: dict[str, Any] = {
        "task": column.task,
        "metric": column.metric,
        "filter": column.filter,
        "higher_is_better": column.higher_is_better,
        "a": a.cells[column].value,
        "b": b.cells[column].value,
        **{name: getattr(c, name) for name in ("difference", "low", "high", "p", "verdict", "reason")},
        **{name: getattr(c, name) for name in ("documents", "clusters", "changed", "left_out", "unit")},
    }
    if flipped is not None:
        found["mcnemar_p"] = flipped.test.p if flipped.test else None
        found["flips"] = [{"doc_id": flip.a.doc_id, "change": flip.change} for flip in flipped.changed]
    return found

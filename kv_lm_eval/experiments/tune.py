"""Find the smallest cache that answers as well as the full one: budget, and the best window, kernel, block size, ...

Scores of the full cache and of a setting are compared document by document; all documents about one text (the depths
of a needle's filler, the questions on a passage) are one observation. A setting counts as good enough when its mean
loss is at most --tolerance with --confidence, over everything that was tried for any task; the test may be looked at
after any number of texts, so easy decisions take few. Budgets are bisected, variants of a budget are halved each time
the texts double (kv_lm_eval/experiments/paired.py says why that is sound, and what it assumes).

Usage:
    kv-lm-eval tune --tasks kv_needle_magic,kv_needle_multikey \\
        --model_args pretrained=kv-tiny,dtype=float32,method=snapkv \\
        --budgets 32,64,128,192,256 --try window_size=8,16,32 --metadata \\
        '{"lengths":[512],"depths":[10,50,90],"samples_per_cell":100}'

Output: per task, and for the mean over all tasks, a table of what was tried and the recommended --model_args, or "none
within tolerance". The last line printed is a JSON document; with --output_path DIR it is also DIR/tune.json, and the
scores are kept in DIR/scores.json, so that the same search goes on after an interruption.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kv_lm_eval import console, files, harness, identity, plugin, progress
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import paired, task_files
from kv_lm_eval.experiments.run_point import versions
from kv_lm_eval.methods import names
from kv_lm_eval.stats import betting, clusters

Settings = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Search for each task and for all of them together; returns the exit status."""
    folders: list[Path] = []
    return console.command("tune", lambda: _tune(argv, folders), lambda: _kept(folders))


def _kept(folders: list[Path]) -> str:
    if not folders:
        return "Nothing of it is kept; with --output_path DIR the same command would go on where it was."
    scores = folders[0] / "scores.json"
    found = f"The scores so far are in {scores}" if scores.is_file() else "There were no scores yet"
    return f"{found}: the same command goes on from there."


def _tune(argv: Sequence[str] | None, folders: list[Path]) -> int:
    args = _parser().parse_args(argv)
    if args.output_path:
        files.check_folder(args.output_path, "--output_path")
        folders.append(args.output_path)
    document = tune(args)
    if args.output_path:
        files.write_json(args.output_path / "tune.json", document)
    print(json.dumps(document))
    return 0


def _metadata(text: str) -> dict[str, Any]:
    found = files.parse_json(text, "--metadata")
    return files.check(found, dict[str, Any], "--metadata")


def _parser() -> argparse.ArgumentParser:
    parser = console.Parser(prog="kv-lm-eval tune", description=__doc__)
    parser.add_argument("--model_args", required=True, help="as of lm_eval; with method=NAME, without a budget")
    parser.add_argument("--tasks", required=True, help="task names, with commas")
    parser.add_argument("--budgets", required=True, help="budgets to try, with commas")
    parser.add_argument("--budget_setting", default="max_capacity_prompt", help="or keep_ratio, window_size, ...")
    parser.add_argument(
        "--try",
        dest="axes",
        action="append",
        default=[],
        metavar="SETTING=A,B,C",
        help="also choose the best of these; may be repeated. Each doubles or triples the candidates, so that each "
        "needs stronger evidence",
    )
    parser.add_argument("--tolerance", type=float, default=0.05, help="largest mean loss that counts as equal (0.05)")
    parser.add_argument("--confidence", type=float, default=0.95, help="that all answers hold (0.95)")
    parser.add_argument("--metric", help="a score of the samples (default: the first of each task)")
    parser.add_argument("--score_range", default="0,1", help="smallest and largest score of a sample (0,1)")
    parser.add_argument("--first_look", type=int, default=32, help="texts of the first round; then doubled (32)")
    parser.add_argument("--max_samples", type=int, help="documents per task at most (default: all)")
    parser.add_argument("--shuffle_seed", type=int, default=0, help="of the order in which documents are drawn")
    parser.add_argument("--metadata", type=str, default="{}", help="as of lm_eval, JSON")
    parser.add_argument("--batch_size", default=1)
    parser.add_argument("--device", default=None)
    parser.add_argument("--num_fewshot", type=int, default=None)
    parser.add_argument("--apply_chat_template", action="store_true")
    parser.add_argument("--include_path", default=None)
    parser.add_argument("--output_path", type=Path, help="folder for tune.json and the scores")
    return parser


def tune(args: argparse.Namespace) -> dict[str, Any]:
    """All searches; returns what is printed as JSON."""
    if not 0 < args.tolerance < 1 or not 0.5 <= args.confidence < 1:
        raise UserError("--tolerance must lie in (0, 1) and --confidence in [0.5, 1)")
    scores = Scores(args)
    harness.check_device(args.device)
    scale = scores.range[1] - scores.range[0]
    tolerance = args.tolerance / scale
    budgets, left_out = candidates(args, scores.base)
    for note in left_out:
        print(f"left out: {note}")
    number = sum(map(len, budgets))
    questions = [[task] for task in scores.order] + ([list(scores.order)] if len(scores.order) > 1 else [])
    alpha = paired.alpha_of(budgets, args.confidence, len(questions))
    print(
        f"{number} candidates and {'1 answer' if len(questions) == 1 else f'{len(questions)} answers'}, each tested at "
        f"{100 * (1 - alpha):.4g} % so that all hold together at {100 * args.confidence:g} %"
    )
    answers = []
    for tasks in questions:
        name = tasks[0] if len(tasks) == 1 else "all tasks, their mean"
        weights = scores.weights(tasks)
        fewest = betting.fewest(tolerance, alpha, float(weights.mean()))
        print(f"{name}: {len(weights)} texts, of which it takes {fewest} where a candidate never loses")
        if len(weights) < fewest:
            print(
                f"\n{name}: {len(weights)} texts cannot show a loss of at most {args.tolerance}, whatever the scores; "
                "give more texts, a larger --tolerance, fewer candidates or a lower --confidence"
            )
            answers.append({"tasks": tasks, "model_args": None, "too_few_texts": len(weights)})
            continue
        answer = paired.search(
            budgets,
            partial(scores.losses, tasks),
            len(weights),
            tolerance,
            args.confidence,
            args.first_look,
            len(questions),
        )
        answers.append(_report(name, tasks, answer, scores, scale, args))
    return {"answers": answers, "runs": scores.runs, "samples_run": scores.samples_run, "versions": versions()}


def candidates(args: argparse.Namespace, base: Settings) -> tuple[list[list[Settings]], list[str]]:
    """Settings of each budget, smallest first; what the method refuses is left out, with the reason."""
    from lm_eval.utils import handle_arg_string

    from kv_lm_eval import config
    from kv_lm_eval.model import HFLM_KEYS

    axes: dict[str, list[Any]] = {}
    for text in args.axes:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--try {text}: give SETTING=A,B,C")
        axes[key] = [handle_arg_string(v) for v in values.split(",")]
    out: list[list[Settings]] = []
    left_out = []
    for budget in sorted(handle_arg_string(b) for b in args.budgets.split(",")):
        variants = []
        for values in itertools.product(*axes.values()):
            settings = {args.budget_setting: budget, **dict(zip(axes, values, strict=True))}
            try:
                config.parse({**base, **settings}, pass_through=HFLM_KEYS)
                variants.append(settings)
            except UserError as error:
                left_out.append(f"{_spelled(settings)}: {error}")
        if variants:
            out.append(variants)
    if not out:
        raise UserError("no candidate is possible:\n" + "\n".join(left_out[:5]))
    return out, left_out


def drawn_texts(labels: Sequence[Sequence[int]], seed: int, most: int | None) -> list[list[list[int]]]:
    """By task, its documents by text, the texts in a random order that all tasks have in common.

    Args:
        labels: by task, the text of each document. most: documents of a task, at most; whole texts.
    """
    count = 1 + max((label for of_task in labels for label in of_task), default=-1)
    rank = np.random.default_rng(seed).permutation(count)
    out = []
    for of_task in labels:
        texts: dict[int, list[int]] = {}
        for i, label in enumerate(of_task):
            texts.setdefault(label, []).append(i)
        ordered = [texts[label] for label in sorted(texts, key=lambda label: int(rank[label]))]
        taken = np.cumsum([len(text) for text in ordered])
        out.append(ordered if most is None else [t for t, n in zip(ordered, taken.tolist(), strict=True) if n <= most])
    return out


class Scores:
    """Per-document scores of settings, run when they are asked for and kept."""

    def __init__(self, args: argparse.Namespace) -> None:
        from lm_eval.utils import simple_parse_args_string

        self.args = args
        args.metadata = _metadata(args.metadata) if isinstance(args.metadata, str) else args.metadata
        self.range = low, high = _range(args.score_range)
        self.base: Settings = simple_parse_args_string(args.model_args)
        self.base.setdefault("method", None)
        if self.base["method"] in (None, "full"):
            raise UserError("which method is to be tuned? Give --model_args ...,method=NAME")
        names.check(str(self.base["method"]))  # before lm-eval's tasks are imported, which takes a second
        plugin.install()
        self.full = {k: v for k, v in self.base.items() if k in _not_of_the_method(self.base)} | {"method": "full"}
        self.run_options = {
            "tasks": args.tasks.split(","),
            "metadata": args.metadata,
            "include_path": args.include_path,
        }
        self.order = self._documents()
        self.file = args.output_path / "scores.json" if args.output_path else None
        self.known: dict[str, dict[str, float]] = {}
        self._keys: dict[tuple[str, str], str] = {}
        if self.file:
            self.known = files.read_json(self.file, dict[str, dict[str, float]]) if self.file.is_file() else {}
        self.runs = self.samples_run = 0

    def _documents(self) -> dict[str, list[list[int]]]:
        """Documents of each task, those about one text together, in the order in which the texts are drawn: a shuffle,
        so that the first are a sample; the same for all tasks, so that those about one text see it at once."""
        metadata = {**self.base, **(self.args.metadata or {})}
        options = self.run_options["tasks"], self.run_options["include_path"], metadata
        with harness.task_manager(*options) as manager, console.quietly():
            harness.check_tasks(self.run_options["tasks"], manager)
            loaded = manager.load(self.run_options["tasks"])["tasks"]
        documents = []
        for name, task in loaded.items():
            if len(getattr(task, "instances", None) or []) or task.get_config("output_type") == "loglikelihood_rolling":
                raise UserError(f"{name}: perplexities have no bounded score per document; take an accuracy")
            documents.append([clusters.texts_of(doc, f"{name} {i}") for i, doc in enumerate(task.eval_docs)])
        labels = clusters.label(documents)
        drawn = drawn_texts([of.tolist() for of in labels], self.args.shuffle_seed, self.args.max_samples)
        return dict(zip(loaded, drawn, strict=True))

    def _heaviest(self, tasks: Sequence[str]) -> float:
        """The largest weight of a text before it is made 1."""
        shares = [[len(text) / self._size(task) for text in self.order[task]] for task in tasks]
        return max((sum(of) / len(tasks) for of in zip(*shares, strict=False)), default=1.0)

    def _size(self, task: str) -> float:
        """Documents of a text of the task, on average."""
        return sum(map(len, self.order[task])) / len(self.order[task])

    def weights(self, tasks: Sequence[str]) -> np.ndarray:
        """[texts] what each text counts, the heaviest 1: its share of a task's documents, the mean over the tasks."""
        out = np.zeros(min(len(self.order[task]) for task in tasks))
        for task in tasks:
            sizes = np.array([len(text) for text in self.order[task]][: len(out)])
            out += sizes / self._size(task) / len(tasks)
        return out / self._heaviest(tasks)

    def losses(self, tasks: Sequence[str], settings: Settings, n: int) -> np.ndarray:
        """[n, 2] weighted losses of the first n texts and their weights, as in stats/betting.py; in score ranges.

        A loss is score(full) - score(settings). Every document of a task counts alike, and so does every task.
        """
        lost = np.zeros(n)
        for task in tasks:
            texts = self.order[task][:n]
            ids = [i for text in texts for i in text]
            full, mine = self.of(self.full, task, ids), self.of({**self.base, **settings}, task, ids)
            lost += np.array([sum(full[i] - mine[i] for i in text) for text in texts]) / self._size(task) / len(tasks)
        lost /= self._heaviest(tasks) * (self.range[1] - self.range[0])
        return np.stack([lost, self.weights(tasks)[:n]], axis=1)

    def of(self, model_args: Settings, task: str, ids: Sequence[int]) -> dict[int, float]:
        """Scores of documents of a task; those not known yet are run."""
        key = self._key(model_args, task)
        known = self.known.setdefault(key, {})
        if missing := [i for i in ids if str(i) not in known]:
            changed = {k: v for k, v in model_args.items() if k == "method" or self.base.get(k) != v}
            print(f"  {task}: {len(missing)} documents with {_spelled(changed)}", flush=True)
            known.update(self._run(model_args, task, missing))
            if self.file:
                files.write_json(self.file, self.known)
        return {i: known[str(i)] for i in ids}

    def _key(self, model_args: Settings, task: str) -> str:
        """Of everything that decides a score; files are read once a search."""
        asked = (_spelled(model_args), task)
        if asked not in self._keys:
            options = {k: v for k, v in vars(self.args).items() if k not in _NOT_DECIDING}
            self._keys[asked] = identity.digest(
                {
                    "identity": identity.before_loading(model_args),
                    "asked": identity.describe(options),
                    "tasks": task_files.of([task], self.args.include_path),
                }
            )
        return self._keys[asked]

    def _run(self, model_args: Settings, task: str, ids: Sequence[int]) -> dict[str, float]:
        with progress.told_every_minute(lambda: f"  {task}: {progress.innermost()}"), console.quietly():
            done = harness.run(
                plugin.MODEL_NAME,
                model_args,
                [task],
                include_path=self.args.include_path,
                metadata=self.args.metadata,
                samples={task: list(ids)},
                batch_size=self.args.batch_size,
                device=self.args.device,
                num_fewshot=self.args.num_fewshot,
                apply_chat_template=self.args.apply_chat_template,
                bootstrap_iters=0,
                log_samples=True,
            )
        assert done is not None, "a search is one process"
        results = done.results
        self.runs += 1
        self.samples_run += len(ids)
        rows = results["samples"][task]
        first_filter = rows[0]["filter"]
        rows = [row for row in rows if row["filter"] == first_filter]
        metric = self.args.metric or next((m for m in rows[0]["metrics"] if isinstance(rows[0][m], (int, float))), None)
        better = results["higher_is_better"][task]
        if metric is None or metric not in rows[0] or better.get(metric) is False:
            names = [m for m in rows[0]["metrics"] if better.get(m) and isinstance(rows[0][m], (int, float))]
            raise UserError(
                f"{task} has no score {metric!r} of which more is better; --metric can be: {', '.join(names)}"
            )
        low, high = self.range
        scores = {str(row["doc_id"]): float(row[metric]) for row in rows}
        if outside := [s for s in scores.values() if not low <= s <= high]:
            raise UserError(f"{task}: {metric}={outside[0]:g} is outside --score_range {self.args.score_range}")
        return scores


# Which documents are asked about and what is made of the scores, and model_args and tasks, which are in their parts
_NOT_DECIDING = frozenset(
    """model_args tasks budgets budget_setting axes tolerance confidence first_look max_samples shuffle_seed batch_size
    device include_path output_path""".split()
)


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--score_range {text}: give the smallest and the largest score, as 0,1") from None
    if not low < high:
        raise UserError(f"--score_range {text}: the first must be the smaller one")
    return low, high


def _not_of_the_method(base: Settings) -> set[str]:
    """Keys of --model_args that the full cache takes too."""
    from kv_lm_eval import config
    from kv_lm_eval.model import HFLM_KEYS

    allowed = HFLM_KEYS | config.FROM_PRETRAINED_KEYS | {"model_kwargs", "overlong", "tail_tokens"}
    return {key for key in base if key in allowed}


def _spelled(settings: Settings) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items())


def _report(
    name: str,
    tasks: Sequence[str],
    answer: paired.Answer[Settings],
    scores: Scores,
    scale: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Prints one search and returns it."""
    rows = []
    for verdict in answer.verdicts:
        seen = {task: [i for text in scores.order[task][: verdict.texts] for i in text] for task in tasks}
        full = np.mean([list(scores.of(scores.full, task, ids).values()) for task, ids in seen.items()])
        rows.append(
            {
                "candidate": _spelled(verdict.candidate),
                "texts": verdict.texts,
                "documents": sum(map(len, seen.values())),
                "full": f"{full:.3f}",
                "score": f"{full - scale * verdict.mean_loss:.3f}",
                "loss": f"{scale * verdict.mean_loss:+.3f}",
                "at most": f"{scale * verdict.at_most:+.3f}",
                "decision": verdict.decision,
            }
        )
    sure = f"{100 * args.confidence:g} % confidence"
    print(f"\n{name}: mean loss against the full cache at most {args.tolerance:g}, {sure}\n")
    print(console.table(rows))
    recommended = None
    if answer.best is not None:
        recommended = _spelled({**scores.base, **answer.best.candidate})
        print(f"\nrecommended: --model_args {recommended}")
    elif any(v.decision == paired.UNDECIDED for v in answer.verdicts):
        most = max(verdict.texts for verdict in answer.verdicts)
        print(f"\nnone within tolerance could be shown with {most} texts ('not shown' may still be)")
    else:
        print("\nnone within tolerance")
    return {
        "tasks": list(tasks),
        "model_args": recommended,
        "tolerance": args.tolerance,
        "confidence": args.confidence,
        "alpha_per_candidate": answer.alpha,
        "rows": rows,
    }

"""What documents say of settings, run when it is asked for and kept: what a search for the smallest cache asks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from kv_lm_eval import console, files, harness, identity, plugin, progress
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import task_files
from kv_lm_eval.methods import names
from kv_lm_eval.stats import clusters

Settings = dict[str, Any]
# Which documents are asked about and what is made of the scores, and model_args and tasks, which are in their parts
_NOT_DECIDING = frozenset(
    """model_args tasks budgets budget_setting axes also loss tolerance confidence largest first_look max_samples
    shuffle_seed batch_size device include_path output_path""".split()
)


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


Value = float | list[float]  # what one document says


class Asked:
    """What documents say of settings, run when it is asked for and kept; a subclass says what that is."""

    files_of_answers = "scores.json"
    rolling = False  # whether perplexities of whole documents are told from one another

    def __init__(self, args: argparse.Namespace) -> None:
        from lm_eval.utils import simple_parse_args_string

        self.args = args
        args.metadata = _metadata(args.metadata) if isinstance(args.metadata, str) else args.metadata
        self.base: Settings = simple_parse_args_string(args.model_args)
        self.base.setdefault("method", None)
        if self.base["method"] in (None, "full"):
            raise UserError("which method is to be tuned? Give --model_args ...,method=NAME")
        names.check(str(self.base["method"]))  # before lm-eval's tasks are imported, which takes a second
        plugin.install()
        self.full = {**only_of_the_model(self.base), "method": "full"}
        self.run_options = {
            "tasks": args.tasks.split(","),
            "metadata": args.metadata,
            "include_path": args.include_path,
        }
        self.order = self._documents()
        self.file = args.output_path / self.files_of_answers if args.output_path else None
        self.known: dict[str, dict[str, Value]] = {}
        self._keys: dict[tuple[str, str], str] = {}
        if self.file:
            self.known = files.read_json(self.file, dict[str, dict[str, Value]]) if self.file.is_file() else {}
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
            rolling = task.get_config("output_type") == "loglikelihood_rolling" and not self.rolling
            if len(getattr(task, "instances", None) or []) or rolling:
                raise UserError(
                    f"{name}: perplexities have no bounded score per document; take an accuracy, or --loss kl, "
                    "which is of whole documents too"
                )
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

    def of(self, model_args: Settings, task: str, ids: Sequence[int]) -> dict[int, Any]:
        """What documents of a task say; those not known yet are run."""
        key = self._key(model_args, task)
        known = self.known.setdefault(key, {})
        if missing := [i for i in ids if str(i) not in known]:
            changed = {k: v for k, v in model_args.items() if k == "method" or self.base.get(k) != v}
            print(f"  {task}: {len(missing)} documents with {spelled(changed)}", flush=True)
            known.update(self._run(model_args, task, missing))
            if self.file:
                files.write_json(self.file, self.known)
        return {i: known[str(i)] for i in ids}

    def _key(self, model_args: Settings, task: str) -> str:
        """Of everything that decides a score; files are read once a search."""
        asked = (spelled(model_args), task)
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

    def _run(self, model_args: Settings, task: str, ids: Sequence[int]) -> dict[str, Value]:
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
                **self.options(),
            )
        assert done is not None, "a search is one process"
        self.runs += 1
        self.samples_run += len(ids)
        rows = done.results["samples"][task]
        return self.values(done.results, task, [row for row in rows if row["filter"] == rows[0]["filter"]])

    def options(self) -> dict[str, Any]:
        """More of lm-eval's, for every run."""
        return {}

    def values(self, results: dict[str, Any], task: str, rows: list[dict[str, Any]]) -> dict[str, Value]:
        """What each document says, by its number.

        Args:
            rows: its samples, of the task's first filter.
        """
        raise NotImplementedError


class Scores(Asked):
    """Per-document scores, and what a setting loses of the full cache's."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.range = _range(args.score_range)
        super().__init__(args)

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

    def values(self, results: dict[str, Any], task: str, rows: list[dict[str, Any]]) -> dict[str, Value]:
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
        return dict(scores)


def _metadata(text: str) -> dict[str, Any]:
    found = files.parse_json(text, "--metadata")
    return files.check(found, dict[str, Any], "--metadata")


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--score_range {text}: give the smallest and the largest score, as 0,1") from None
    if not low < high:
        raise UserError(f"--score_range {text}: the first must be the smaller one")
    return low, high


def only_of_the_model(base: Settings) -> Settings:
    """What of --model_args any method takes."""
    from kv_lm_eval import config
    from kv_lm_eval.model import HFLM_KEYS

    allowed = HFLM_KEYS | config.FROM_PRETRAINED_KEYS | {"model_kwargs", "overlong", "tail_tokens"}
    return {key: value for key, value in base.items() if key in allowed}


def spelled(settings: Settings) -> str:
    """As in --model_args."""
    return ",".join(f"{key}={value}" for key, value in settings.items())

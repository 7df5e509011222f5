"""Reads lm-eval's results and samples files, and the points of a sweep, whatever folders they lie in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from kv_lm_eval.errors import UserError
from kv_lm_eval.stats.clusters import Texts, texts_of

UNCOMPRESSED = ("full", "hf", "no_cache")
# Of --model_args, what changes an answer and is no setting of a compression method.
CONDITIONS = (
    "dtype revision attn_implementation max_length load_in_4bit load_in_8bit quantization_config peft delta tokenizer "
    "trust_remote_code add_bos_token enable_thinking chat_template_args overlong"
).split()
BLOCK = 32  # tokens; put together to longer ones where they are compared
STATES = {"done": "scored", "failed": "failed", "out_of_memory": "OOM", "running": "unfinished"}


@dataclass(frozen=True)
class Run:
    """One results file of lm-eval, or one point of a sweep that has none.

    state is "scored", "failed", "OOM" or "unfinished"; conditions are what else decides the answers, beside model,
    method and settings; name is a sweep's own name for it.
    """

    results: dict[str, Any]
    results_file: Path | None = None
    point: dict[str, Any] = field(default_factory=dict)
    state: str = "scored"

    @property
    def config(self) -> dict[str, Any]:
        """lm-eval's `config`."""
        return self.results.get("config") or {}

    @cached_property
    def model_args(self) -> dict[str, Any]:
        """--model_args as a mapping."""
        given = self.config.get("model_args") or self.point.get("model_args") or {}
        if isinstance(given, str):
            given = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
        return dict(given)

    @property
    def model(self) -> str:
        """The model's name, without its folder."""
        name = (
            self.results.get("model_name") or self.model_args.get("pretrained") or self.config.get("model") or "model"
        )
        return Path(str(name)).name

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings: all of them for a finished run, those configured for another."""
        found = self.config.get("kv_compression") or self.point.get("settings") or {}
        return {k: v for k, v in found.items() if k not in ("method", *CONDITIONS)}

    @property
    def method(self) -> str:
        """The method's name; "hf" and the like for a model of lm-eval's own."""
        found = (self.config.get("kv_compression") or {}).get("method") or self.point.get("method")
        return str(found or self.config.get("model") or self.point.get("model") or "model")

    @property
    def is_full_cache(self) -> bool:
        """Whether nothing is compressed by construction: method=full, or no method of ours at all."""
        return self.method in UNCOMPRESSED or not (self.config.get("kv_compression") or self.point.get("method"))

    @property
    def conditions(self) -> dict[str, Any]:
        """What else decides the answers."""
        found = {k: self.model_args[k] for k in CONDITIONS if k in self.model_args}
        if dtype := self.config.get("model_dtype"):
            found["dtype"] = str(dtype).removeprefix("torch.")
        if self.config.get("gen_kwargs"):
            found["gen_kwargs"] = self.config["gen_kwargs"]
        if self.results.get("chat_template"):
            found["chat_template"] = True
        if self.results.get("system_instruction"):
            found["system_instruction"] = self.results["system_instruction"]
        return found

    @property
    def limit(self) -> Any:
        """--limit."""
        return self.config.get("limit", self.point.get("limit"))

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """The numbers of each task and group, by name; empty mappings for a run without results."""
        if self.state == "scored":
            return self.results.get("results") or {}
        return {task: {} for task in self.point.get("tasks") or []}

    @property
    def date(self) -> float:
        """Seconds since 1970."""
        return float(self.results.get("date") or 0)

    @property
    def stats(self) -> dict[str, Any]:
        """What compression did (kv_lm_eval.metrics), {} for a stock model."""
        return self.config.get("kv_stats") or {}

    def task_stats(self, task: str) -> dict[str, Any]:
        """The same for one task; {} where it is not known."""
        return (self.stats.get("by_task") or {}).get(task) or {}

    def samples_file(self, task: str) -> Path | None:
        """Where --log_samples wrote a task's answers, None if it did not."""
        if self.results_file is None:
            return None
        date = self.results_file.stem.removeprefix("results_")
        file = self.results_file.with_name(f"samples_{task}_{date}.jsonl")
        return file if file.is_file() else None

    def subtasks(self, group: str) -> list[str]:
        """The leaf tasks of a group, those of its subgroups included; [] for a task."""
        below = self.results.get("group_subtasks") or {}
        leaves: list[str] = []
        for name in below.get(group) or []:
            leaves += self.subtasks(name) or [name]
        return list(dict.fromkeys(leaves))

    def command(self) -> str:
        """A command line that asks for the same, without the paths of its output."""
        model = self.config.get("model") or self.point.get("model") or "kvcompressed"
        inner = {t for names in (self.results.get("group_subtasks") or {}).values() for t in names}
        tasks = self.point.get("tasks") or [t for t in self.results.get("results") or {} if t not in inner]
        words = [
            f"kv-lm-eval run --model {model}",
            f"--model_args {_comma(self.model_args)}",
            f"--tasks {','.join(tasks)}",
        ]
        for name in ("batch_size", "device", "limit", "num_fewshot", "gen_kwargs"):
            value = self.config.get(name, self.point.get(name))
            if value:
                words.append(f"--{name} {_comma(value) if isinstance(value, dict) else value}")
        return " ".join(words)


def _comma(mapping: dict[str, Any]) -> str:
    text = ",".join(f"{k}={v}" for k, v in mapping.items() if v is not None)
    return f"'{text}'" if set(text) & set(' "{}()[]$&|;<>*?') else text


def read(folder: Path) -> tuple[list[Run], list[str]]:
    """Every run below a folder, oldest first, and what could not be read, in words.

    Raises:
        UserError: there is no such folder, or no results in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Give the --output_path of your lm_eval runs, or of a sweep.")
    runs, notes, seen = [], [], set()
    order = {p["id"]: i for plan in folder.rglob("plan.json") for i, p in enumerate(_json(plan).get("points") or [])}
    for file in sorted(folder.rglob("point.json")):
        point = _json(file)
        state = STATES.get(point.get("status", ""), "unfinished")
        seen |= set(file.parent.rglob("results_*.json"))
        results_file = file.parent / (point.get("results_file") or "")
        if state == "scored" and results_file.is_file():
            runs.append(Run(_json(results_file), results_file, point))
        elif state == "scored":
            notes.append(f"{file} says that it is done, but its results file is missing.")
        else:
            runs.append(Run({}, None, point, state))
    runs.sort(key=lambda run: order.get(run.point.get("id", ""), len(order)))
    loose = []
    for file in sorted(set(folder.rglob("results_*.json")) - seen):
        results = _json(file)
        if isinstance(results.get("results"), dict) and "config" in results:
            loose.append(Run(results, file))
        else:
            notes.append(f"{file} is not a results file of lm-eval and was left out.")
    runs += sorted(loose, key=lambda run: run.date)
    if not runs:
        raise UserError(
            f"No results below {folder}. lm-eval writes results_*.json there when it is run with "
            "`--output_path FOLDER`; add `--log_samples` for differences with intervals and for the answers."
        )
    return runs, notes


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_number(value: Any) -> TypeGuard[float]:
    """A real number: no bool, no NaN, no "N/A"."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """One answer to one document, cut to what a report shows."""

    doc_id: int
    filter: str
    prompt_hash: str
    prompt_end: str
    prompt_chars: int
    target: str
    answer: str
    detail: str  # log-likelihoods of the choices, the text before the filter
    metrics: dict[str, Any]
    place: tuple[int, float] | None  # context_length, document_depth_percent of a needle
    blocks: tuple[tuple[float, int], ...] = ()  # (log-likelihood, tokens) of each BLOCK tokens, where they are recorded
    texts: Texts = Texts()  # what it is about, by which documents belong together


SampleKey = tuple[str, int]  # hash of the document, and which of its copies


def samples(file: Path, prompt_chars: int = 700, answer_chars: int = 1500) -> dict[str, dict[SampleKey, Sample]]:
    """The answers in a samples file, by filter and then by document; prompts and answers cut to their end and start."""
    found: dict[str, dict[SampleKey, Sample]] = {}
    for record in _lines(file):
        sample = _sample(record, prompt_chars, answer_chars)
        of_filter = found.setdefault(sample.filter, {})
        digest = str(record.get("doc_hash") or record.get("doc_id"))
        copy = 0
        while (digest, copy) in of_filter:
            copy += 1
        of_filter[digest, copy] = sample
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _sample(record: dict[str, Any], prompt_chars: int, answer_chars: int) -> Sample:
    calls = list((record.get("arguments") or {}).values())
    prompt = str(calls[0].get("arg_0", "")) if calls else ""
    doc = record.get("doc")
    doc = doc if isinstance(doc, dict) else {}
    answer, detail = _answer(record, calls)
    place = (doc.get("context_length"), doc.get("document_depth_percent"))
    return Sample(
        doc_id=int(record.get("doc_id", -1)),
        filter=str(record.get("filter", "none")),
        prompt_hash=str(record.get("prompt_hash", "")),
        prompt_end=prompt[-prompt_chars:],
        prompt_chars=len(prompt),
        target=str(record.get("target", ""))[:answer_chars],
        answer=answer[:answer_chars],
        detail=detail[:answer_chars],
        metrics={name: record[name] for name in record.get("metrics") or [] if name in record},
        place=place if all(is_number(part) for part in place) else None,  # type: ignore[arg-type]
        blocks=_blocks((doc.get("per_token") or {}).get("nll") or []),
        texts=texts_of(doc, str(record.get("doc_hash") or record.get("doc_id"))),
    )


def _blocks(nll: list[float | None]) -> tuple[tuple[float, int], ...]:
    """Short stretches of neighbouring tokens, of which longer ones can be made (stats/blocks.py)."""
    parts = [[v for v in nll[i : i + BLOCK] if v is not None] for i in range(0, len(nll), BLOCK)]
    return tuple((-math.fsum(part), len(part)) for part in parts if part)


def _answer(record: dict[str, Any], calls: list[dict[str, Any]]) -> tuple[str, str]:
    """A text, or the choice taken with all log-likelihoods, or the log-likelihood of a text."""
    filtered = record.get("filtered_resps") or []
    first = filtered[0] if filtered else ""
    if isinstance(first, (list, tuple)) and first and len(filtered) == len(calls):
        scored = [(float(r[0]), str(c.get("arg_1", "")).strip()) for r, c in zip(filtered, calls, strict=True)]
        best = max(scored)[1]
        return best, "\n".join(f"{score:9.2f}  {choice}" for score, choice in scored)
    if len(calls) == 1 and "arg_1" not in calls[0]:
        return "", f"log-likelihood {first}"
    raw = record.get("resps") or []
    text = raw[0][0] if raw and isinstance(raw[0], list) and raw[0] else first
    return str(first), "" if str(text).strip() == str(first).strip() else f"before the filter: {text}"

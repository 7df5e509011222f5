"""What one run of lm-eval was and what came out of it, as its results file says."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

UNCOMPRESSED = ("full", "hf", "no_cache")


@dataclass(frozen=True)
class Run:
    """One results file of lm-eval, or one point of a sweep that has none.

    state is "scored"; "failed", "OOM", "running" (or stopped on the way) or "planned" for points without results;
    "damaged" for those whose results cannot be believed.
    """

    results: dict[str, Any]
    results_file: Path | None = None
    point: dict[str, Any] = field(default_factory=dict)
    state: str = "scored"
    covers: tuple[str, ...] = ()  # the tasks of the groups that a point without results asks for
    answers: dict[str, Path] = field(default_factory=dict)  # files of answers by task, where they are not beside

    @property
    def config(self) -> dict[str, Any]:
        """lm-eval's `config`."""
        return self.results.get("config") or {}

    @cached_property
    def model_args(self) -> dict[str, Any]:
        """--model_args as a mapping."""
        given = self.config.get("model_args") or self.point.get("model_args") or {}
        return parse_pairs(given) if isinstance(given, str) else dict(given)

    @property
    def model(self) -> str:
        """The model's name, without its folder."""
        name = (
            self.results.get("model_name") or self.model_args.get("pretrained") or self.config.get("model") or "model"
        )
        return Path(str(name)).name or str(name)

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings: all of them for a finished run, those configured for another."""
        found = self.config.get("kv_compression") or self.point.get("settings") or {}
        return {k: v for k, v in found.items() if k != "method"}

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
    def tasks(self) -> dict[str, dict[str, Any]]:
        """The numbers of each task and group, by name; empty mappings for a run without results."""
        if self.state == "scored":
            return self.results.get("results") or {}
        return {task: {} for task in (*(self.point.get("tasks") or []), *self.covers)}

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

    def documents(self, task: str) -> int | None:
        """How many documents a task was asked, None where that is not recorded."""
        found = (self.results.get("n-samples") or {}).get(task) or {}
        return found.get("effective")

    def samples_file(self, task: str) -> Path | None:
        """Where --log_samples wrote a task's answers, None if it did not."""
        if self.results_file is None or task in self.answers:
            return self.answers.get(task)
        date = self.results_file.stem.removeprefix("results_")
        file = self.results_file.with_name(f"samples_{task}_{date}.jsonl")
        logged = task in (self.results.get("task_hashes") or {})
        return file if logged or file.exists() else None

    def subtasks(self, group: str) -> list[str]:
        """The leaf tasks of a group, those of its subgroups included; [] for a task."""
        return _leaves(self.results.get("group_subtasks") or {}, group, ())


def _leaves(below: dict[str, list[str]], group: str, above: tuple[str, ...]) -> list[str]:
    leaves: list[str] = []
    for name in below.get(group) or []:
        if name not in above:  # a damaged file may hold a circle
            leaves += _leaves(below, name, (*above, group)) or [name]
    return list(dict.fromkeys(leaves))


def parse_pairs(text: str) -> dict[str, Any]:
    """`key=value,key=value`, values typed as lm-eval types them."""
    return {k: _typed(v.strip()) for k, equals, v in (p.partition("=") for p in text.split(",")) if equals}


def _typed(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def is_number(value: Any) -> TypeGuard[float]:
    """A real number: no bool, no NaN, no "N/A"."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def digest(value: Any) -> str:
    """JSON that is the same for the same value."""
    return json.dumps(value, sort_keys=True, default=str)

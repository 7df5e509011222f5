"""The command line that asks for the numbers of a run again, from what its files record."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import answers
from kv_lm_eval.reporting.run import Run, parse_pairs

DEFAULT_SEEDS = [0, 1234, 1234, 1234]
SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
OURS = "kv_"  # how the names of our tasks begin; they need no --include_path


def lines(run: Run) -> list[str]:
    """Commands for a shell, without the paths of their output: one, or several where tasks had other numbers of
    examples; a comment where no command line can give the same.
    """
    if run.results.get("model_source") == "CUSTOM":
        return ["# run from Python with a model object: there is no command line that gives the same"]
    out = []
    for shots, tasks in _tasks(run).items():
        options = {"model": run.config.get("model") or run.point.get("model") or "kvcompressed"}
        options |= {
            "model_args": run.model_args,
            "tasks": ",".join(tasks),
            "num_fewshot": shots,
            **_options(run, tasks),
        }
        out.append(" ".join(["kv-lm-eval run", *(_word(k, v) for k, v in options.items() if v not in (None, {}, ""))]))
    return out


def _tasks(run: Run) -> dict[int | None, list[str]]:
    """What to ask for, by number of examples; None: the tasks' own."""
    if run.point:
        return {run.point.get("num_fewshot"): list(run.point["tasks"])}
    below = run.results.get("group_subtasks") or {}
    inner = {task for names in below.values() for task in names}
    shots = run.results.get("n-shot") or {}
    found: dict[int | None, list[str]] = {}
    for name in dict.fromkeys([*run.tasks, *(group for group, tasks in below.items() if tasks)]):
        if name not in inner:
            numbers = {shots.get(leaf) for leaf in run.subtasks(name) or [name]}
            found.setdefault(numbers.pop() if len(numbers) == 1 else None, []).append(name)
    return found


def _options(run: Run, tasks: list[str]) -> dict[str, Any]:
    """All else, by the name of its option, in lm-eval's order; None where it was not given."""
    point, config, results = run.point, run.config, run.results

    def asked(name: str) -> Any:
        return config[name] if config.get(name) is not None else point.get(name)

    template = point.get("apply_chat_template") or results.get("chat_template") is not None or None
    multiturn = results.get("fewshot_as_multiturn", point.get("fewshot_as_multiturn"))
    seeds = [config[name] for name in SEEDS] if set(SEEDS) <= set(config) else point.get("seed") or DEFAULT_SEEDS
    seeds = seeds if isinstance(seeds, list) else [seeds] * 4
    unsafe = any((results.get("configs") or {}).get(t, {}).get("unsafe_code") for t in _leaves(run, tasks))
    limit = asked("limit")
    return {
        "apply_chat_template": template,
        "fewshot_as_multiturn": "false" if template and multiturn is False else None,
        "system_instruction": results.get("system_instruction") or point.get("system_instruction"),
        "limit": int(limit) if limit is not None and limit == int(limit) else limit,
        "samples": json.dumps(chosen) if limit is None and (chosen := _chosen_documents(run, tasks)) else None,
        "batch_size": asked("batch_size"),
        "max_batch_size": point.get("max_batch_size"),
        "device": asked("device"),
        "gen_kwargs": _mapping(asked("gen_kwargs")),
        "metadata": _metadata(run, tasks),
        "seed": None if seeds == DEFAULT_SEEDS else ",".join(map(str, seeds)),
        "include_path": point.get("include_path") or _include_path(run, tasks),
        "confirm_run_unsafe_code": (unsafe or point.get("confirm_run_unsafe_code")) or None,
    }


def _mapping(value: Any) -> dict[str, Any]:
    return parse_pairs(value) if isinstance(value, str) else value or {}


def _leaves(run: Run, tasks: list[str]) -> list[str]:
    return [leaf for task in tasks for leaf in run.subtasks(task) or [task]]


def _chosen_documents(run: Run, tasks: list[str]) -> dict[str, list[int]]:
    """--samples: the documents of tasks of which, without a limit, not all were asked."""
    chosen = {}
    for task in _leaves(run, tasks):
        count = (run.results.get("n-samples") or {}).get(task) or {}
        if count.get("effective") == count.get("original") or not count.get("original"):
            continue
        try:
            found = answers.read(run, task)
        except UserError:
            continue
        numbers = sorted({sample.doc_id for of_filter in found.values() for sample in of_filter.values()})
        if numbers and len(numbers) < count["original"]:
            chosen[task] = numbers
    return chosen


def metadata(run: Run, task: str) -> dict[str, Any]:
    """--metadata as a task saw it: lm-eval records it together with the task's own and with --model_args."""
    args = run.model_args
    found = _recorded(run, task).items()
    return {k: v for k, v in found if k not in ("version", "config_source") and (k, v) not in args.items()}


def _recorded(run: Run, task: str) -> dict[str, Any]:
    found = ((run.results.get("configs") or {}).get(task) or {}).get("metadata")
    return found if isinstance(found, dict) else {}


def _metadata(run: Run, tasks: list[str]) -> dict[str, Any]:
    if run.point:
        return run.point.get("metadata") or {}
    seen = [metadata(run, task) for task in _leaves(run, tasks)]
    # What was given reached every task; given again, a task's own changes nothing.
    return {k: v for k, v in (seen[0] if seen else {}).items() if all(k in s and s[k] == v for s in seen)}


def _include_path(run: Run, tasks: list[str]) -> str | None:
    """The folder of tasks that are neither lm-eval's nor ours."""
    for task in _leaves(run, tasks):
        source = _recorded(run, task).get("config_source")
        if isinstance(source, str) and source.endswith(".yaml") and not task.startswith(OURS):
            if "/lm_eval/tasks/" not in Path(source).as_posix():
                return str(Path(source).parent)
    return None


# ---------------------------------------------------------------------------------------------- words


def _word(name: str, value: Any) -> str:
    """An option and its value, quoted for a shell."""
    if value is True:
        return f"--{name}"
    text = _pairs(value) if isinstance(value, dict) else str(value)
    return f"--{name}={shlex.quote(text)}" if text.startswith("-") else f"--{name} {shlex.quote(text)}"


def _pairs(mapping: dict[str, Any]) -> str:
    """key=value,... where lm-eval reads the same values back, else JSON."""
    if all(_is_plain(key, value) for key, value in mapping.items()):
        return ",".join(f"{key}={value}" for key, value in mapping.items())
    try:
        text = json.dumps(mapping, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        text = json.dumps(mapping)
    return text


def _is_plain(key: str, value: Any) -> bool:
    text = str(value)
    if not re.fullmatch(r"\w+", key) or not re.fullmatch(r"[\w./:@+-]+", text):
        return False
    back = _as_read(text)
    return type(back) is type(value) and back == value


def _as_read(text: str) -> Any:
    """A value of key=value as lm-eval's command line types it."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.isnumeric():
        return int(text)
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text

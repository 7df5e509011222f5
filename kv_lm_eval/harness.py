"""One run of lm-eval from Python: plugged in, its input checked before weights load, its files on disk and whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_lm_eval import files, plugin, reports, saving
from kv_lm_eval.errors import UserError, close_names


@dataclass
class Run:
    """lm-eval's results dictionary, the files written, and what the task packages say of them."""

    results: dict[str, Any]
    written: list[Path]
    said: str = ""


def run(
    model: Any,
    model_args: Mapping[str, Any],
    tasks: Sequence[Any],
    *,
    output_path: str | Path | None = None,
    include_path: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    model_name: str | None = None,
    **options: Any,
) -> Run | None:
    """lm_eval.simple_evaluate with our plug-in; None on every process but the first of several.

    Args:
        model: lm-eval's name of one, or the object.
        tasks: names, or what else simple_evaluate takes.
        output_path: a folder for results_*.json and, with log_samples, samples_*.jsonl.
        model_name: how the results call a model object.
        **options: simple_evaluate's own.

    Raises:
        UserError: a limit, a task or a folder that cannot be used, before weights are loaded; or results that could
            not be written, and where they are.
    """
    plugin.install()
    import lm_eval
    from lm_eval.loggers import EvaluationTracker

    check_limit(options.get("limit"))
    if model == plugin.MODEL_NAME:
        check_device(options.get("device") or model_args.get("device"))
    _look_at_the_machine_once()
    if options.get("use_cache"):
        check_use_cache(options["use_cache"])
    if output_path is not None:
        saving.check_output(output_path)
    tracker = None if output_path is None else EvaluationTracker(output_path=str(output_path))
    with task_manager(tasks, include_path, {**model_args, **(metadata or {})}) as manager:
        check_tasks(tasks, manager)
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=dict(model_args),
            tasks=list(tasks),
            task_manager=manager,
            evaluation_tracker=tracker,
            metadata=None if metadata is None else dict(metadata),
            **options,
        )
    if results is None:
        return None
    if model_name is not None:  # lm-eval names a loaded model by its weights
        results["config"]["model"] = model_name
    written: list[Path] = []
    if tracker is not None:
        if model_name is not None:
            tracker.general_config_tracker.model_source = model_name
        written = saving.save(results, tracker)
    said = reports.write_all({file for file in written if file.suffix == ".json"})
    return Run(dict(results), written, said)


@contextmanager
def task_manager(
    tasks: Sequence[Any], include_path: str | Path | None = None, metadata: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """lm-eval's index of tasks, only ours where that will do: it saves seconds a run.

    Raises:
        UserError: the folder is not there, which lm-eval would pass over.
    """
    if include_path:
        files.check_is_folder(include_path)
    plugin.install()
    from lm_eval.tasks import TaskManager

    small = include_path is None and all(isinstance(t, str) for t in tasks) and plugin.owns_tasks(list(tasks))
    with plugin.only_our_tasks() if small else nullcontext():
        yield TaskManager(include_path=str(include_path) if include_path else None, metadata=dict(metadata or {}))


def check_tasks(tasks: Sequence[Any], manager: Any) -> None:
    """Raises UserError for a name that no task, group or tag has."""
    if not tasks:
        raise UserError("which tasks? Give at least one; `kv-lm-eval ls tasks` lists ours, `lm_eval ls tasks` all")
    for name in tasks:
        if isinstance(name, str) and not name.endswith(".yaml") and not manager.match_tasks([name]):
            raise UserError(
                f"there is no task {name!r}{close_names(name, manager.all_tasks)}; `kv-lm-eval ls tasks` lists ours, "
                "`lm_eval ls tasks` all"
            )


def check_use_cache(path: str | Path) -> None:
    """Raises UserError where lm-eval could not keep answers for --use_cache, or those that it kept are damaged."""
    from kv_lm_eval.requests import kept_answers

    files.check_folder(Path(path).parent, "the folder of --use_cache")
    for file in Path(path).parent.glob(f"{Path(path).name}_rank*.db"):
        if found := kept_answers.damage(file):
            raise UserError(
                f"{file} is damaged ({found}), so that none of its answers can be believed; remove it, or give another "
                "--use_cache"
            )


def check_limit(limit: Any) -> None:
    """Raises UserError for a --limit that is no number of documents and no share of them."""
    if limit is None:
        return
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool) and math.isfinite(limit)
    if not number or limit <= 0 or (limit > 1 and limit != int(limit)):
        raise UserError(
            f"limit={limit} is no number of documents a task: give 1 or more, a share below 1, or leave it out for all"
        )


def check_device(device: Any) -> None:
    """Raises UserError for a --device that torch does not know, for which lm-eval would take another."""
    import torch

    try:
        torch.device(device if device is not None else "cpu")
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device={device}: {str(error).splitlines()[0]}") from None


def _look_at_the_machine_once() -> None:
    """lm-eval asks pip and the system for the results file of every run: seconds each, and the same in one process."""
    from torch.utils import collect_env

    if not hasattr(collect_env.get_pretty_env_info, "cache_info"):
        collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)


def hf_arguments() -> set[str]:
    """Names of what lm-eval's Hugging Face model takes, read off its source: importing it takes seconds."""
    import ast
    from importlib.util import find_spec

    found = find_spec("lm_eval.models.huggingface")
    assert found is not None and found.origin is not None
    module = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    (model,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "HFLM")
    (init,) = (node for node in model.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return {a.arg for a in [*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs]} - {"self"}

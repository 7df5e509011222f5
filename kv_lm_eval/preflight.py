"""What a run was asked for, and what can be wrong in it, looked at before torch and lm-eval's model are imported."""

from __future__ import annotations

import argparse
import os
from typing import Any

from kv_lm_eval import files, harness, plugin, saving
from kv_lm_eval.errors import WHICH_MODEL, UserError, close_names

NAMES_A_PLACE = ("config", "tasks", "output_path", "use_cache", "include_path")  # and an empty one is none


def check(asked: dict[str, Any]) -> None:
    """What a run was asked for, before torch and the model are imported, cheapest first.

    Raises:
        UserError: an output path, a limit, a method or a setting that cannot be used.
    """
    ours = asked.get("model") == plugin.MODEL_NAME
    if ours:
        from kv_lm_eval.methods import names

        settings = _model_args(asked)
        if isinstance(settings.get("method"), str):
            names.check(settings["method"])  # before lm-eval's tasks are imported, which takes a second
        if not settings.get("pretrained"):
            raise UserError(WHICH_MODEL)
    plugin.install()
    _check_model(asked.get("model") or "hf")
    harness.check_limit(asked.get("limit"))
    _check_numbers(asked)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and (asked.get("limit") or 0) >= 1 and asked["limit"] < ranks:
        raise UserError(
            f"limit={asked['limit']:g} leaves some of {ranks} processes without a document, which lm-eval cannot do; "
            f"give --limit {ranks} or more, or fewer processes"
        )
    for folder in _folders(asked):
        files.check_is_folder(folder)
    _check_tasks(asked)
    if asked.get("output_path"):
        saving.check_output(asked["output_path"])
    elif asked.get("log_samples") or asked.get("predict_only"):
        raise UserError("--log_samples and --predict_only write files: add --output_path DIR")
    if asked.get("use_cache"):
        harness.check_use_cache(asked["use_cache"])
    if ours:
        from kv_lm_eval import config

        config.parse(_model_args(asked), pass_through=harness.hf_arguments())
        config.check_pretrained(settings["pretrained"])
        harness.check_device(asked.get("device") or settings.get("device"))


def _check_model(name: Any) -> None:
    from lm_eval.api.registry import model_registry

    known = list(model_registry.keys())
    if name not in known:
        raise UserError(f"there is no model {name!r}{close_names(str(name), known)}; there are: {', '.join(known)}")


def _check_numbers(asked: dict[str, Any]) -> None:
    """Those that lm-eval takes as they come."""
    if asked.get("num_fewshot") is not None and asked["num_fewshot"] < 0:
        raise UserError(f"--num_fewshot {asked['num_fewshot']} is negative; it counts examples, 0 or more")
    size = str(asked.get("batch_size", 1))
    word, _, times = size.partition(":")
    if not (word == "auto" and (times or "1").isdecimal()) and not (size.isdecimal() and int(size) > 0):
        raise UserError(f"--batch_size {size} is no number of rows: give 1 or more, auto, or auto:N")
    if asked.get("max_batch_size") is not None and asked["max_batch_size"] < 1:
        raise UserError(f"--max_batch_size {asked['max_batch_size']} must be at least 1")


def _check_tasks(asked: dict[str, Any]) -> None:
    """Whether there are some, and whether those that are ours by their names are there."""
    names = _names(asked)
    if not names:
        raise UserError("which tasks? Add --tasks NAME,...; `kv-lm-eval ls tasks` lists ours, `lm_eval ls tasks` all")
    ours = [name for name in names if isinstance(name, str) and name.startswith(plugin.TASK_PREFIX)]
    if ours and not asked.get("include_path"):
        from lm_eval.tasks import TaskManager

        with plugin.only_our_tasks():
            harness.check_tasks(ours, TaskManager())


def _folders(asked: dict[str, Any]) -> list[str]:
    """Of tasks that are not lm-eval's: one that is not there would be passed over."""
    given = asked.get("include_path") or []
    return [given] if isinstance(given, str) else list(given)


def _names(asked: dict[str, Any]) -> list[Any]:
    """The tasks asked for; a blank one is none."""
    tasks = asked.get("tasks") or []
    names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    return [name for name in names if not isinstance(name, str) or name.strip()]


def _model_args(asked: dict[str, Any]) -> dict[str, Any]:
    from lm_eval.utils import simple_parse_args_string

    given = asked.get("model_args") or {}
    return simple_parse_args_string(given) if isinstance(given, str) else dict(given)


def asked_for(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `run`, those of its --config file included; a 0 is an answer too.

    Raises:
        UserError: the file cannot be read, or an option that names something is empty: taken for one that is not
            given, it would lose what it was to keep.
    """
    for option in NAMES_A_PLACE:
        if getattr(args, option, None) == "":
            raise UserError(f"--{option} is empty; is a variable of the shell not set?")
    config = {}
    if getattr(args, "config", None):
        config = files.read_yaml(args.config, dict[str, Any])
    return {**config, **{key: value for key, value in vars(args).items() if value or value == 0}}


def small_index_will_do(asked: dict[str, Any]) -> bool:
    """Whether only our folders of tasks need to be indexed.

    A folder of the user's may replace our tasks and groups by some that need lm-eval's, so it rules this out.
    """
    names = _names(asked)
    return not asked.get("include_path") and all(isinstance(n, str) for n in names) and plugin.owns_tasks(names)

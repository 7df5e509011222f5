"""Adds our model and our task folders to lm-eval; the only file that touches its registry and TaskManager.

The model is registered as the string "module:Class" and imported by lm-eval when it is asked for, so plugging in
costs no torch import. Our task folders go between lm-eval's own and the user's `--include_path`: later ones win.
An lm-eval that discovers entry points itself (after 0.4.13) is left to do so.

Two ways in: the start-up shim (shim/README.md), through `hooked_spec`, and `install()` for Python users:

    >>> import kv_lm_eval.plugin
    >>> kv_lm_eval.plugin.install()
    >>> lm_eval.simple_evaluate(model="kvcompressed", ...)
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

MODEL_NAME = "kvcompressed"
# Exactly module:name of the decorated class: lm-eval takes the class for a rival of any other spelling.
MODEL_PLACEHOLDER = "kv_lm_eval.model:KVCompressedLM"
TASK_PREFIX = "kv_"

log = logging.getLogger(__name__)
_only_ours: ContextVar[bool] = ContextVar("_only_ours", default=False)


def install() -> None:
    """Plug into lm-eval now, whether or not the shim is there or switched off; a second call does nothing."""
    import lm_eval.models  # noqa: F401  (its import fills the registry: a name put there before would hide "hf")

    _register_model()
    _wrap_task_manager()
    _write_files_whole()


def task_folders() -> list[Path]:
    """The folders with our task YAMLs: one in a wheel; in a checkout two more beside the package."""
    ours = Path(__file__).resolve().parent
    beside = (ours.parent / name for name in ("longbench_tasks", "needle") if not (ours / "tasks" / name).is_dir())
    return [ours / "tasks", *beside]


@contextmanager
def only_our_tasks() -> Iterator[None]:
    """Inside, a new TaskManager skips lm-eval's own task folder, whose 14,000 YAMLs take seconds to index."""
    token = _only_ours.set(True)
    try:
        yield
    finally:
        _only_ours.reset(token)


def owns_tasks(names: Sequence[str]) -> bool:
    """Whether every name (or glob pattern) starts with our prefix and is found in our folders."""
    if not names or not all(name.startswith(TASK_PREFIX) for name in names):
        return False
    from lm_eval.tasks import TaskManager

    with only_our_tasks():
        index = TaskManager()
    return all(index.match_tasks([name]) for name in names)


def hooked_spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Find an lm-eval package as Python would, and have our part run right after its code; called by the shim."""
    spec = PathFinder.find_spec(name, path)
    if spec is None or spec.loader is None:
        return spec
    hooks = {
        "lm_eval.models": (_register_model,),
        "lm_eval.tasks": (_wrap_task_manager, _write_files_whole, _say_mistakes_in_a_line),
    }[name]
    original = spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        original(module)
        for hook in hooks:
            _never_break_lm_eval(hook)

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


def _never_break_lm_eval(hook: Callable[[], None]) -> None:
    try:
        hook()
    except Exception as error:
        log.warning("kv-lm-eval: %s failed, so lm-eval runs without it: %r", hook.__name__, error)


def _register_model() -> None:
    from importlib.metadata import entry_points

    from lm_eval.api import registry

    # A host with load_plugins finds an installed package by itself, but not a checkout on PYTHONPATH.
    discovers = hasattr(registry, "load_plugins") and entry_points(group="lm_eval.models", name=MODEL_NAME)
    if not discovers and MODEL_NAME not in registry.model_registry:
        registry.model_registry.register(MODEL_NAME, target=MODEL_PLACEHOLDER)


def _wrap_task_manager() -> None:
    from lm_eval.tasks import TaskManager

    original = TaskManager.__init__
    if hasattr(original, "wrapped_by_kv_lm_eval"):
        return
    signature = inspect.signature(original)
    discover = getattr(inspect.getmodule(TaskManager), "discover_plugin_task_paths", list)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        if _only_ours.get():
            call.arguments["include_defaults"] = False
        theirs = call.arguments.get("include_path")
        ours = [str(folder) for folder in task_folders() if folder not in discover()]
        call.arguments["include_path"] = [*ours, *_as_list(theirs)]
        original(*call.args, **call.kwargs)
        self.include_path = theirs

    init.wrapped_by_kv_lm_eval = True  # type: ignore[attr-defined]
    TaskManager.__init__ = init
    load_all = TaskManager.load

    @functools.wraps(load_all)
    def load(self: Any, task_list: Any) -> Any:
        return _without_lacking(load_all(self, task_list), task_list)

    TaskManager.load = load


def _without_lacking(loaded: Any, asked: Any) -> Any:
    """Takes out of groups what says that it cannot run here, and names it.

    Raises:
        UserError: such a task was asked for by its name, or nothing else is left.
    """
    from kv_lm_eval.errors import UserError

    lacking = {name: why for name, task in loaded["tasks"].items() if (why := getattr(task, "lacking", ""))}
    nothing_left = len(lacking) == len(loaded["tasks"])
    for name, why in lacking.items():
        if nothing_left or name in _as_list(asked):
            raise UserError(f"{name} {why}")
        del loaded["tasks"][name]
        for group in loaded.get("groups", {}).values():
            group.pop(name)
    for why in dict.fromkeys(lacking.values()):
        log.warning("left out: %s. Each %s", ", ".join(name for name, own in lacking.items() if own == why), why)
    if lacking:
        loaded["group_map"] = {group.name: group.child_names for group in loaded.get("groups", {}).values()}
    return loaded


def _write_files_whole() -> None:
    from kv_lm_eval import saving

    saving.install()


def _say_mistakes_in_a_line() -> None:
    """Only in lm-eval's own command: a program that imports it keeps its tracebacks."""
    main = sys.modules.get("__main__")
    as_module = getattr(getattr(main, "__spec__", None), "name", None)
    if as_module == "lm_eval.__main__" or Path(sys.argv[0]).stem in ("lm_eval", "lm-eval"):
        from kv_lm_eval import console

        console.print_user_errors_in_one_line()


def _as_list(include_path: Any) -> list[Any]:
    if isinstance(include_path, (list, tuple)):
        return list(include_path)
    return [include_path] if include_path else []

"""The `kv-lm-eval` command: lm-eval's own command line, plugged in without the start-up shim and started faster.

lm-eval spends seconds at each start on indexing its 14,000 task files. When every task asked for is ours, `run`
indexes our folders alone. What can be wrong in a command line is looked at before torch and lm-eval's model are
imported, as far as that goes. A user's mistake is one line and ends with exit status 2; under `lm_eval` it is the same
line.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from kv_lm_eval import __version__, console, files, harness, plugin, reports, saving
from kv_lm_eval.errors import WHICH_MODEL, UserError, close_names

USAGE = """\
usage: kv-lm-eval COMMAND ...

  run ...          evaluate, as `lm_eval run`; the word may be left out
  ls WHAT          list our tasks, groups, subtasks or tags
  validate ...     whether tasks are there, as `lm_eval validate`
  methods [NAME]   list the compression methods, or explain one
  quickstart ...   a first table with the built-in model: no network, no GPU
  sweep FILE ...   many runs from one YAML file; it goes on where it was
  report DIR ...   tables, pictures and a page from a folder of results
  compare A B ...  two runs on the same documents: differences, intervals, flips
  tune ...         the smallest cache that answers as well as the full one
  bench ...        speed and memory of the methods on one model

`kv-lm-eval COMMAND --help` says more. For a start:

  kv-lm-eval run --model kvcompressed --tasks kv_quickstart_needle \\
      --model_args pretrained=kv-tiny,method=snapkv,max_capacity_prompt=128
"""
NAMES_A_PLACE = ("config", "tasks", "output_path", "use_cache", "include_path")  # and an empty one is none
MAINS = {  # commands that are a module of their own
    "quickstart": "kv_lm_eval.quickstart",
    "sweep": "kv_lm_eval.experiments.sweep",
    "report": "kv_lm_eval.reporting.command",
    "compare": "kv_lm_eval.experiments.compare",
    "tune": "kv_lm_eval.experiments.tune",
    "bench": "kv_lm_eval.bench.command",
}
OF_LM_EVAL = {  # commands that lm-eval parses, with what our help says of them
    "run": (
        "usage: kv-lm-eval run --model MODEL --model_args KEY=VALUE,... --tasks TASK,...\n"
        "           [--output_path DIR] [--log_samples] [option ...]",
        "Evaluate a model on tasks, as `lm_eval run` does.",
        "kv-lm-eval run --model kvcompressed --tasks kv_quickstart_needle \\\n"
        "    --model_args pretrained=kv-tiny,method=snapkv,max_capacity_prompt=128",
    ),
    "ls": (
        "usage: kv-lm-eval ls tasks|groups|subtasks|tags [--include_path DIR]",
        "List our tasks; `lm_eval ls` lists lm-eval's own too.",
        "kv-lm-eval ls tasks",
    ),
    "validate": (
        "usage: kv-lm-eval validate --tasks TASK,... [--include_path DIR]",
        "Whether tasks are there and can be read.",
        "kv-lm-eval validate --tasks kv_quickstart,kv_needle_magic",
    ),
}
COMMANDS = (*OF_LM_EVAL, "methods", *MAINS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, as console.py lists them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    match arguments:
        case [] | ["-h" | "--help"]:
            return console.command("kv-lm-eval", lambda: _print(USAGE), lists=True)
        case ["--version"]:
            return console.command("kv-lm-eval", lambda: _print(f"kv-lm-eval {__version__}"), lists=True)
        case ["methods", *names]:
            return console.command("kv-lm-eval", lambda: _methods(names), lists=True)
        case [str(name), *rest] if name in MAINS:
            return int(import_module(MAINS[name]).main(rest))
    run = Evaluation(arguments)
    return console.command("kv-lm-eval", run.work, run.kept, lists=arguments[0] in ("ls", "validate"))


def _print(text: str) -> int:
    print(text)
    return 0


def _methods(given: list[str]) -> int:
    parser = console.Parser(
        prog="kv-lm-eval methods", description="List the compression methods, or explain one with its settings."
    )
    parser.add_argument("name", nargs="*", metavar="NAME", help="of a method, or path/to/file.py:Class")
    names = parser.parse_args(given).name
    if len(names) > 1:
        raise UserError(f"`kv-lm-eval methods` explains one method at a time, got {len(names)}: {' '.join(names)}")
    if names:
        from kv_lm_eval.methods.names import check

        check(names[0])  # before torch is imported
    from kv_lm_eval.listing import print_methods

    return print_methods(names[0] if names else None)


class Evaluation:
    """What lm_eval.__main__ does, with our plug-in, checks before anything is loaded and, where it is safe, the small
    task index."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.asked: dict[str, Any] = {}
        self.before: set[Path] = set()
        self.begun = False

    def work(self) -> int:
        """Parse, check, evaluate, check what was written."""
        word = self.arguments[0]
        if not word.startswith("-") and word not in COMMANDS:
            near = close_names(word, COMMANDS)
            raise UserError(f"there is no command {word!r}{near}; `kv-lm-eval --help` lists them")
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging

        setup_logging()
        parser = HarnessCLI()
        _in_our_words(parser)
        sys.argv = ["kv-lm-eval", *self.arguments]  # HarnessCLI reads it, to put in a missing "run"
        with _parsing():
            args = parser.parse_args()
        if args.command != "run":
            plugin.install()
            with plugin.only_our_tasks() if args.command == "ls" else nullcontext():
                parser.execute(args)
            return 0
        self.asked = _asked(args)
        check(self.asked)
        output = self._output()
        self.before = reports.results_files(output) if output else set()
        with plugin.only_our_tasks() if _small_index_will_do(self.asked) else nullcontext():
            with saving.of_every_model(), self._noting_its_begin():
                parser.execute(args)
        if output is not None and int(os.environ.get("RANK", "0")) == 0:
            new = reports.results_files(output) - self.before
            if not new:
                raise UserError(f"no results file was written to {output}")
            if said := reports.write_all(new):
                print(said)
        return 0

    @contextmanager
    def _noting_its_begin(self) -> Iterator[None]:
        """Requests are run from lm-eval's `evaluate` on: before it, tasks and model are only looked up and loaded."""
        from lm_eval import evaluator

        original = evaluator.evaluate

        @functools.wraps(original)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self.begun = True
            return original(*args, **kwargs)

        evaluator.evaluate = evaluate
        try:
            yield
        finally:
            evaluator.evaluate = original

    def kept(self) -> str:
        """What a stopped run leaves."""
        output, cache = self._output(), self.asked.get("use_cache")
        if not self.begun:
            return "Nothing had been run."
        if output and (new := reports.results_files(output) - self.before):
            return f"Its results are in {', '.join(map(str, sorted(new)))}."
        if cache and Path(f"{cache}_rank0.db").is_file():
            return f"The answers so far are in {cache}_rank0.db: the same command goes on from there."
        if cache:
            return "Nothing of it is kept."
        return "Nothing of it is kept; with --use_cache FILE the same command would go on where it was."

    def _output(self) -> Path | None:
        asked = self.asked.get("output_path")
        return saving.folder_of(asked) if asked else None


def _in_our_words(parser: Any) -> None:
    """lm-eval's parsers say `lm-eval`, in lines that are wider than a terminal."""
    commands = next(a for a in parser._parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    for name, (usage, description, example) in OF_LM_EVAL.items():
        one = commands[name]
        one.prog, one.usage = f"kv-lm-eval {name}", usage.removeprefix("usage: ")
        one.description, one.epilog = description, f"example:\n{textwrap.indent(example, '  ')}"
        one.formatter_class = console.Help
        for action in one._actions:
            action.help = action.help and action.help.replace("lm-eval ls", "kv-lm-eval ls")


@contextmanager
def _parsing() -> Iterator[None]:
    """Inside, what lm-eval's parsers find wrong is a UserError: of one line, without their usage."""
    original = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = console.refuse  # type: ignore[assignment,method-assign]
    try:
        yield
    except (ValueError, TypeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(error).split(" Hint:")[0] or "the command line cannot be read") from error
    finally:
        argparse.ArgumentParser.error = original  # type: ignore[method-assign]


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


def _asked(args: argparse.Namespace) -> dict[str, Any]:
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


def _small_index_will_do(asked: dict[str, Any]) -> bool:
    """A folder of the user's may replace our tasks and groups by some that need lm-eval's, so it rules this out."""
    names = _names(asked)
    return not asked.get("include_path") and all(isinstance(n, str) for n in names) and plugin.owns_tasks(names)

"""The commands that are lm-eval's own: its command line with our plug-in, started faster, and a true exit status.

lm-eval spends seconds at each start on indexing its 14,000 task files. When every task asked for is ours, `run` indexes
our folders alone.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from kv_lm_eval import console, plugin, preflight, reports, saving
from kv_lm_eval.errors import UserError

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
        "usage: kv-lm-eval validate --tasks TASK,... [--include_path DIR] [--question]",
        "Whether tasks are there and can be read; with --question, where their prompts' questions begin.",
        "kv-lm-eval validate --tasks kv_quickstart,kv_needle_magic",
    ),
}


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
        self.asked = preflight.asked_for(args)
        preflight.check(self.asked)
        output = self._output()
        self.before = reports.results_files(output) if output else set()
        with plugin.only_our_tasks() if preflight.small_index_will_do(self.asked) else nullcontext():
            with saving.of_every_model(), self._noting_its_begin():
                parser.execute(args)
        if output is not None and int(os.environ.get("RANK", "0")) == 0:
            new = reports.results_files(output) - self.before
            if not new:
                raise UserError(f"no results file was written to {output}")
            if said := reports.write_all(new):
                print(said)
        _leave_together()
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


def _leave_together() -> None:
    """Of several processes each waits for all, and lets go of what connects them. One that ends before, with threads of
    the connection running, may be aborted, and take the one that writes the results along."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

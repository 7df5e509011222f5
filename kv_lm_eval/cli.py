"""The `kv-lm-eval` command: lm-eval's own command line, plugged in without the start-up shim and started faster.

lm-eval spends seconds at each start on indexing its 14,000 task files. When every task asked for is ours, `run`
indexes our folders alone. A user's mistake is told in a few lines and ends with exit status 2; under `lm_eval` the
same message stands at the end of a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kv_lm_eval import __version__, plugin, reports
from kv_lm_eval.errors import UserError

USAGE = """\
usage: kv-lm-eval COMMAND ...

  run ...           evaluate: the arguments of `lm_eval run`, "run" may be left out
  ls WHAT           list our tasks, groups, subtasks or tags (`lm_eval ls` lists lm-eval's too)
  methods [NAME]    list the compression methods, or explain one
  quickstart ...    a small evaluation with the built-in model: no network, no GPU
  validate ...      as `lm_eval validate`

  kv-lm-eval run --model kvcompressed --tasks kv_quickstart \\
      --model_args pretrained=kv-tiny,method=snapkv,max_capacity_prompt=128,window_size=16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 for a mistake in what the user asked."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `kv-lm-eval methods | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        print(f"\nkv-lm-eval stopped:\n{textwrap.indent(str(error), '  ')}\n", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    match arguments:
        case [] | ["-h" | "--help"]:
            print(USAGE)
            return 0
        case ["--version"]:
            print(f"kv-lm-eval {__version__}")
            return 0
        case ["methods"] | ["methods", _]:
            from kv_lm_eval.methods.listing import print_methods

            return print_methods(arguments[1] if arguments[1:] else None)
        case ["methods", *names]:
            raise UserError(f"`kv-lm-eval methods` explains one method at a time, got {len(names)}: {' '.join(names)}")
        case ["quickstart", *rest]:
            from kv_lm_eval.quickstart import main as quickstart

            return quickstart(rest)
    return _harness(arguments)


def _harness(arguments: list[str]) -> int:
    """What lm_eval.__main__ does, with our plug-in and, where it is safe, the small task index."""
    plugin.install()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    parser = HarnessCLI()
    sys.argv = ["kv-lm-eval", *arguments]  # HarnessCLI reads it, to put in a missing "run"
    args = parser.parse_args()
    output = _output_folder(args)
    before = reports.results_files(output) if output else set()
    with plugin.only_our_tasks() if _small_index_will_do(args) else nullcontext():
        parser.execute(args)
    if output and (said := reports.write_all(reports.results_files(output) - before)):
        print(said)
    return 0


def _output_folder(args: argparse.Namespace) -> Path | None:
    """Where the results go: --output_path is a folder, or a .json file in one."""
    asked = _asked(args).get("output_path")
    if not asked:
        return None
    return Path(asked).parent if str(asked).endswith(".json") else Path(asked)


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `run`, those of its --config file included."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    config = EvaluatorConfig.load_yaml_config(args.config) if getattr(args, "config", None) else {}
    return {**config, **{key: value for key, value in vars(args).items() if value}}


def _small_index_will_do(args: argparse.Namespace) -> bool:
    """A folder of the user's may replace our tasks and groups by some that need lm-eval's, so it rules this out."""
    if args.command == "ls":
        return True
    asked = _asked(args)
    tasks = asked.get("tasks") or []
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    return not asked.get("include_path") and all(isinstance(n, str) for n in names) and plugin.owns_tasks(names)

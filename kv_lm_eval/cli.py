"""The `kv-lm-eval` command: which commands there are, and the module that each of them is.

A user's mistake is one line and exit status 2 (console.py), told before torch is imported as far as that goes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from kv_lm_eval import __version__, console
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.evaluation import OF_LM_EVAL, Evaluation

USAGE = """\
usage: kv-lm-eval COMMAND ...

  run ...          evaluate, as `lm_eval run`; the word may be left out
  ls WHAT          list our tasks, groups, subtasks or tags
  validate ...     whether tasks are there; with --question, where they ask it
  methods [NAME]   list the compression methods, or explain one
  quickstart ...   a first table with the built-in model: no network, no GPU
  sweep FILE ...   many runs from one YAML file; it goes on where it was
  report DIR ...   tables, pictures and a page from a folder of results
  compare A B ...  two runs on the same documents: differences, intervals, flips
  inspect ...      a page: which tokens each head kept of one prompt
  fidelity ...     which layer, head or treatment moves a method most
  tune ...         the smallest cache that answers as well as the full one
  bench ...        speed and memory of the methods on one model
  plan MODEL ...   what a run will hold in memory, and the batch that fits

`kv-lm-eval COMMAND --help` says more. For a start:

  kv-lm-eval run --model kvcompressed --tasks kv_quickstart_needle \\
      --model_args pretrained=kv-tiny,method=snapkv,max_capacity_prompt=128
"""
MAINS = {  # commands that are a module of their own
    "quickstart": "kv_lm_eval.quickstart",
    "sweep": "kv_lm_eval.experiments.sweep",
    "report": "kv_lm_eval.reporting.command",
    "compare": "kv_lm_eval.experiments.compare",
    "inspect": "kv_lm_eval.analysis.inspect",
    "fidelity": "kv_lm_eval.analysis.attribution",
    "tune": "kv_lm_eval.experiments.tune",
    "bench": "kv_lm_eval.bench.command",
    "plan": "kv_lm_eval.bench.plan",
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
        case ["validate", *rest] if "--question" in rest:
            return int(import_module("kv_lm_eval.question").main(rest))
        case [str(word), *_] if not word.startswith("-") and word not in COMMANDS:
            return console.command("kv-lm-eval", lambda: _unknown(word))
    run = Evaluation(arguments)
    return console.command("kv-lm-eval", run.work, run.kept, lists=arguments[0] in ("ls", "validate"))


def _unknown(word: str) -> NoReturn:
    raise UserError(f"there is no command {word!r}{close_names(word, COMMANDS)}; `kv-lm-eval --help` lists them")


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

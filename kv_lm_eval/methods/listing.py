"""`kv-lm-eval methods`: what there is, what it takes, and where it comes from, read off the classes themselves."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import textwrap
from typing import Any

from kv_lm_eval.config import ALIASES, EngineSettings
from kv_lm_eval.methods import base
from kv_lm_eval.methods.budget import Heads, Pyramid, Ratio, RatioAbove, Slots
from kv_lm_eval.methods.evicted import Compensate
from kv_lm_eval.methods.schedule import Schedule


def print_methods(name: str | None) -> int:
    """Prints the table of methods, or all about one; returns the exit status."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    if name is None:
        _print_table(width)
    else:
        _print_one(base.load(name), width)
    return 0


def _print_table(width: int) -> None:
    rows = []
    for name in base.available():
        cls = base.load(name)
        first = _doc(cls).split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")
        rows.append((name, cls.paper.split(" ")[0] or "-", first))
    left, middle = (max(len(r[i]) for r in rows) + 2 for i in (0, 1))
    print(f"{'method':{left}}{'paper':{middle}}what it does")
    for name, paper, first in rows:
        text = textwrap.wrap(first, max(30, width - left - middle))
        print(f"{name:{left}}{paper:{middle}}{text[0]}")
        for line in text[1:]:
            print(" " * (left + middle) + line)
    print("\nAll about one: kv-lm-eval methods NAME. Your own: method=path/to/file.py:ClassName (docs/methods.md).")


def _print_one(cls: type[base.Method], width: int) -> None:
    print(f"method={cls.name}\n")
    print(_doc(cls))
    print("\nSettings (--model_args NAME=VALUE):")
    _print_fields(cls, {}, width)
    if cls.compresses:
        unless = f", unless {cls.capacity_setting} is given," if cls.capacity_setting else ""
        print(f"  and{unless} one budget of:")
        _print_fields(Slots, {}, width)
        _print_fields(Ratio, {}, width)
        print(_line("compression_ratio", None, "share of the pairs that is removed, 1 - keep_ratio", width))
        print("  shared out by:")
        layers = "how layers share max_capacity_prompt (uniform, pyramid)"
        print(_line("layer_budget", cls.presets.get("layer_budget", "uniform"), layers, width))
        _print_fields(Pyramid, cls.presets, width, only="beta")
        _print_fields(Heads, cls.presets, width)
        print("  cut when:")
        _print_fields(Schedule, cls.presets, width)
        _print_fields(RatioAbove, {"prune_after": None}, width, only="prune_after")  # unset is not 0
        print("  the rest:")
        _print_fields(Compensate, {"evicted": "drop", **cls.presets}, width)
    print("  every method:")
    _print_fields(EngineSettings, {}, width)
    names = {f.name for f in dataclasses.fields(cls)} | {"max_capacity_prompt"}
    if aliases := [f"{a} = {t}" for a, t in ALIASES.items() if t in names]:
        print("\n" + textwrap.fill("Other names understood: " + ", ".join(aliases) + ".", width))


def _print_fields(cls: Any, presets: dict[str, Any], width: int, only: str = "") -> None:
    for field in dataclasses.fields(cls):
        if only and field.name != only:
            continue
        default = presets.get(field.name, field.default)
        about = field.metadata.get("help", "")
        if choices := field.metadata.get("choices"):
            about += " (" + ", ".join(map(str, choices)) + ")"
        print(_line(field.name, None if default is dataclasses.MISSING else default, about, width))


def _line(name: str, default: Any, about: str, width: int) -> str:
    head = f"    {name}" + (f" = {default}" if default is not None else "")
    return "\n".join(textwrap.wrap(about, width, initial_indent=f"{head:32}  ", subsequent_indent=" " * 34))


def _doc(cls: type[base.Method]) -> str:
    return inspect.cleandoc(cls.__doc__ or "(no description)")

"""`kv-lm-eval methods`: what there is, what it takes, and where it comes from, read off the classes themselves."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from kv_lm_eval.config import ALIASES, STORAGE_KEYS, EngineSettings
from kv_lm_eval.methods import base, evicted, storage
from kv_lm_eval.methods.budget import Heads, Layers, Ratio, RatioAbove, Slots, Threshold
from kv_lm_eval.methods.schedule import Schedule
from kv_lm_eval.methods.unit import Unit


def print_methods(name: str | None) -> int:
    """Prints the table of methods, or all about one; returns the exit status."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    if name is None:
        _print_table(width)
    else:
        _print_one(base.load(name), width)
    return 0


def markdown() -> str:
    """The table of docs/methods.md: every method, its settings, when it cuts and what it looks at."""
    heads = ("method", "what it does", "settings (defaults)", "paper", "cuts", "streamed documents", "looks at")
    rows = []
    for name in base.available():
        cls = base.load(name)
        rows.append([f"`{name}`", _summary(cls), _settings(cls) or "-", _paper(cls), *_when(cls)])
    return table(heads, rows)


def short_table() -> str:
    """The table of README.md: every method, what it does, and its own settings or those that it sets of others."""
    rows = []
    for name in base.available():
        cls = base.load(name)
        parent = cls.__mro__[1].__module__.rpartition(".")[2].rstrip("_")
        own = f"those of `{parent}`" if parent in base.available() else _settings(cls)
        names = {f.name for f in dataclasses.fields(cls)}
        sets = ", ".join(f"`{k}={v}`" for k, v in cls.presets.items() if k not in names)
        rows.append([f"`{name}`", _summary(cls), "; ".join(filter(None, (own, sets))) or "-"])
    return table(("method", "what it does", "settings (defaults)"), rows)


def treatments() -> str:
    """The table of docs/methods.md of what may become of evicted pairs."""
    rows = []
    for name in evicted.available():
        cls = evicted.load(name)
        rows.append([f"`evicted={name}`", _summary(cls), _settings(cls) or "-"])
    return table(("treatment", "what it does", "settings (defaults)"), rows)


def storages() -> str:
    """The table of docs/methods.md of the forms in which pairs may be held."""
    rows = []
    for name in storage.available():
        cls = storage.load(name)
        asked = [f"`{storage.KEY}={n}`" for n in (name, *cls.variants)] + [f"`{key}=N`" for key in cls.asked_by[:1]]
        rows.append([", ".join(asked), _summary(cls), _settings(cls) if name != storage.Storage.name else "-"])
    return table(("form", "what it does", "settings (defaults)"), rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]).replace("<", "&lt;")


def _settings(cls: type[Any]) -> str:
    own = [f for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING]
    return ", ".join(f"`{f.name}`" + ("" if f.default is None else f" ({f.default})") for f in own)


def _paper(cls: type[base.Method]) -> str:
    return cls.paper.split(" ")[0] or "-"


def _summary(cls: type[Any]) -> str:
    return _doc(cls).split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")


def _when(cls: type[base.Method]) -> tuple[str, str, str]:
    """When a method cuts after a prompt, when in a streamed document, and what its choice looks at, by its defaults."""
    if not cls.uses_cache:
        return "no cache: recomputes", "the same", "-"
    if not cls.compresses and cls().pages is not None:
        return "never; queries read pages", "the same", "bounds of keys"
    if not cls.compresses:
        form = storage.chosen(cls.presets)[0]
        return (f"never; {form.does}", "the same", "-") if is_storage(cls) else ("never", "never", "-")
    method, every = cls(), cls.presets.get("compress_every", 0)
    step = every or EngineSettings().rolling_compress_every
    rolling = "at every token" if step == 1 else f"every {step} tokens"
    after = "after the prompt, " + (f"then {rolling}" if every else "once")
    if method.sinks_and_recent is not None:
        looks = "positions"
    elif cls.reads_again:
        looks = "attention of a second reading of all tokens"
    elif cls.reads_hidden:
        looks = "hidden states, as tokens come"
    elif cls.accumulates:
        looks = "attention of all queries"
    elif method.moments_from is not None:
        looks = "keys, values, mean and covariance of the queries"
    elif method.num_queries:
        looks = f"attention of the last {method.num_queries} queries".replace("last 1 queries", "last query")
    else:
        looks = "keys, values or positions"
    return after, rolling, looks


def is_storage(cls: type[base.Method]) -> bool:
    """Whether the method is a form of storage and nothing else."""
    return not cls.compresses and bool(STORAGE_KEYS & set(cls.presets))


def _print_table(width: int) -> None:
    rows = []
    for name in base.available():
        cls = base.load(name)
        rows.append((name, _paper(cls), _summary(cls)))
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
    after, rolling, looks = _when(cls)
    print(f"\nCuts: {after}. In streamed documents: {rolling}. Looks at: {looks}.")
    own = frozenset(f.name for f in dataclasses.fields(cls))
    print("\nSettings (--model_args NAME=VALUE):")
    _print_fields(cls, {}, width)
    if cls.compresses and cls.takes_budget:
        unless = f", unless {' or '.join(cls.capacity_settings)} is given," if cls.capacity_settings else ""
        print(f"  and{unless} one budget of:")
        _print_fields(Slots, {}, width)
        _print_fields(Ratio, {}, width, only="keep_ratio")
        print(_line("compression_ratio", None, "share of the pairs that is removed, 1 - keep_ratio", width))
        _print_fields(Threshold, {"threshold_recent": None}, width)
        print("  shared out by:")
        _print_fields(Layers, cls.presets, width, without=frozenset({"rounding"}))
        _print_fields(Heads, cls.presets, width)
        print("  chosen as:")
        _print_fields(Unit, cls.presets, width, without=frozenset({"rounding"}))
    if cls.compresses:
        print("  cut when:")
        _print_fields(Schedule, cls.presets, width, without=own)
        _print_fields(RatioAbove, {"prune_after": None}, width, only="prune_after")  # unset is not 0
        print("  the rest:")
        default = cls.presets.get("evicted", "drop")
        about = f"what becomes of the pairs that are not kept ({', '.join(evicted.available())})"
        print(_line("evicted", default, about, width))
        for name in evicted.available():
            if dataclasses.fields(evicted.load(name)):
                print(f"  evicted={name}:")
                _print_fields(evicted.load(name), cls.presets, width)
    if cls.compresses or is_storage(cls):
        print("  pairs held as:")
        print(_line(storage.KEY, storage.Storage.name, f"in what form ({', '.join(storage.names())})", width))
        for name in storage.available()[1:]:
            kind = storage.load(name)
            also = f" (or by {' or '.join(kind.asked_by)})" if kind.asked_by else ""
            print(f"  {storage.KEY}={name}{also}:")
            _print_fields(kind, cls.presets, width)
    print("  every method:")
    _print_fields(EngineSettings, {}, width)
    names = {f.name for f in dataclasses.fields(cls)} | {"max_capacity_prompt"}
    if aliases := [f"{a} = {t}" for a, t in ALIASES.items() if t in names]:
        print("\n" + textwrap.fill("Other names understood: " + ", ".join(aliases) + ".", width))


def _print_fields(
    cls: Any, presets: dict[str, Any], width: int, only: str = "", without: frozenset[str] = frozenset()
) -> None:
    for field in dataclasses.fields(cls):
        if (only and field.name != only) or field.name in without:
            continue
        default = presets.get(field.name, field.default)
        about = field.metadata.get("help", "")
        if choices := field.metadata.get("choices"):
            about += " (" + ", ".join(map(str, choices)) + ")"
        print(_line(field.name, None if default is dataclasses.MISSING else default, about, width))


def _line(name: str, default: Any, about: str, width: int) -> str:
    head = f"    {name}" + (f" = {default}" if default is not None else "")
    return "\n".join(textwrap.wrap(about, width, initial_indent=f"{head:32}  ", subsequent_indent=" " * 34))


def _doc(cls: type[Any]) -> str:
    return inspect.cleandoc(cls.__doc__ or "(no description)")

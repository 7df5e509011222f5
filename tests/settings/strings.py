"""Random `--model_args` strings, drawn from what the methods themselves say they take: fields, types and choices."""

from __future__ import annotations

import dataclasses
import random
import types
import typing
from typing import Any

from kv_lm_eval.config import STORAGE_KEYS, parse
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import base, evicted, storage
from kv_lm_eval.methods.budget import Heads, Layers
from kv_lm_eval.methods.schedule import Schedule
from kv_lm_eval.settings import EngineSettings

WHOLE = (0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 50, 64, 100, 200, 512)
SHARES = (0, 0.01, 0.1, 0.2, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
TEXTS = ("", "many", "[", "[]", "[1", "a;b", "true", "None", "-", "±", "0x10", "1e", "'", "file.yaml", "NaN")
NUMBERS = (-1, -7, 1.5, 0.3, 1e90, -1e90, float("nan"), float("inf"), 2**31, 2**31 - 1, 10**6, 10**9, 1e-300)
MINUTES = {"compile"}  # what takes a minute a case
PARTS = (Layers, Heads, Schedule)
STORAGES = [storage.load(name) for name in reversed(storage.available())]  # of one name twice, the first form's


def settings_of(method: str) -> dict[str, dataclasses.Field[Any]]:
    """All that a method takes, by name, with those of every treatment of the evicted."""
    cls = base.load(method)
    parts: list[Any] = [cls, EngineSettings]
    if cls.compresses:
        parts += [*PARTS, *map(evicted.load, evicted.available()), *STORAGES]
    elif STORAGE_KEYS & set(cls.presets):
        parts += STORAGES
    return {f.name: f for part in parts for f in dataclasses.fields(part) if f.name not in MINUTES}


def sensible(field: dataclasses.Field[Any], rng: random.Random) -> Any:
    """A value of the field's type, or one of its choices."""
    if choices := field.metadata.get("choices"):
        return rng.choice(choices)
    kind = _types().get(field.name, str)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    kind = rng.choice([o for o in options if o is not type(None)])
    if kind is bool:
        return rng.choice([True, False])
    if kind is int:
        return rng.choice(WHOLE)
    if kind is float:
        return rng.choice(SHARES)
    if typing.get_origin(kind) is tuple:
        return [rng.randrange(5) for _ in range(rng.randint(0, 3))]
    return rng.choice([*map(str, WHOLE), "full", "question", "none"])


def _types() -> dict[str, Any]:
    parts = [
        EngineSettings,
        *PARTS,
        *STORAGES,
        *map(base.load, base.available()),
        *map(evicted.load, evicted.available()),
    ]
    return {name: kind for part in parts for name, kind in typing.get_type_hints(part).items()}


def budget(method: str, rng: random.Random) -> dict[str, Any]:
    """One budget of any kind that the method takes."""
    cls = base.load(method)
    if not cls.compresses:
        return {}
    kinds: list[dict[str, Any]] = [{name: rng.choice((12, 24, 40, 64, 100))} for name in cls.capacity_settings]
    if cls.takes_budget:
        share = rng.choice((0.1, 0.25, 0.5, 0.8))
        kinds += [
            {"max_capacity_prompt": rng.choice((12, 24, 40, 64, 100))},
            {"keep_ratio": share},
            {"compression_ratio": share},
            {"keep_ratio": share, "prune_after": rng.choice((0, 20, 60))},
        ]
    return rng.choice(kinds) if kinds else {}  # by a threshold of its own


def draw(rng: random.Random) -> str:
    """Half of the strings are settings that go together, in the others anything may be wrong."""
    args = compose(rng)
    if rng.random() < 0.5:
        while not _accepted(args):
            args = compose(rng)
    elif rng.random() < 0.8:
        spoil(args, rng)
    items = list(args.items())
    rng.shuffle(items)
    return ",".join(f"{name}={str(value).replace(' ', '')}" for name, value in items)


def _accepted(args: dict[str, Any]) -> bool:
    try:
        parse(args)
    except UserError:
        return False
    return True


def compose(rng: random.Random) -> dict[str, Any]:
    """A method with a budget and up to five more settings."""
    method = rng.choice(base.available())
    args: dict[str, Any] = {"method": method, **budget(method, rng)}
    takes = settings_of(method)
    for name in rng.sample(sorted(takes), min(rng.choice((0, 1, 1, 2, 2, 3, 5)), len(takes))):
        args[name] = sensible(takes[name], rng)
    if "residual_length" in takes and rng.random() < 0.2:
        args[storage.KEY] = rng.choice(list(storage.names()))
    if "window_size" in takes and "window_size" not in args and rng.random() < 0.5:
        args["window_size"] = rng.choice((2, 4, 8))
    return args


def spoil(args: dict[str, Any], rng: random.Random) -> None:
    """Something out of range, of the wrong type, unknown, or in contradiction to the rest."""
    every = sorted({name for method in base.available() for name in settings_of(method)} | {"max_capacity_prompt"})
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice([*args, rng.choice(every)])
        match rng.randrange(5):
            case 0:
                args[name] = rng.choice(TEXTS)
            case 1:
                args[name] = rng.choice(NUMBERS)
            case 2:
                args[name.replace("e", "", 1) + rng.choice(("", "s", "_"))] = args.get(name, 3)
            case 3:
                args[rng.choice(every)] = rng.choice(WHOLE)
            case _:
                args |= {"keep_ratio": rng.choice(SHARES), "max_capacity_prompt": rng.choice(WHOLE)}

"""What a user wrote, as the type that a setting has: -1.0 is -1, "0;1" is (0, 1), and 1.5 is no whole number."""

from __future__ import annotations

import dataclasses
import types
import typing
from math import isfinite
from typing import Any

from kv_lm_eval.errors import UserError, close_names

VALUE_ALIASES: dict[tuple[str, str], Any] = {
    ("pooling", "maxpool"): "max",
    ("pooling", "avgpool"): "avg",
    ("block_size", "fullc"): "full",
}
VALUE_ALIASES |= {("nbits", "None"): 0, ("nbits", "none"): 0}
LARGEST = 2**31 - 1  # positions are 32-bit numbers


def dataclass_of(cls: Any, values: dict[str, Any]) -> Any:
    """Builds a settings dataclass from the keys that it has, with types coerced and choices checked."""
    hints = typing.get_type_hints(cls)
    taken = {}
    for field in dataclasses.fields(cls):
        if field.name in values:
            value = VALUE_ALIASES.get((field.name, str(values[field.name])), values[field.name])
            choices = field.metadata.get("choices", ())
            if "none" in choices and str(value).lower() == "none":  # a choice by that name, not a missing value
                value = "none"
            else:
                value = coerce(value, hints[field.name], field.name)
            if choices and value not in choices:
                allowed = ", ".join(map(str, choices))
                raise UserError(
                    f"{field.name}={value} is not one of: {allowed}{close_names(str(value), map(str, choices))}"
                )
            taken[field.name] = value
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{cls.name or cls.__name__} needs {field.name}: {field.metadata.get('help', '')}")
    return cls(**taken)


def coerce(value: Any, kind: Any, name: str) -> Any:
    """The CLI turns -1 into -1.0 and 1e3 into 1000.0: integers come back as integers, fractions as errors."""
    options = (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if type(None) in options:
            return None
        raise UserError(f"{name}=None: a value is needed")
    target = next(o for o in options if o is not type(None))
    try:
        if typing.get_origin(target) is tuple:
            return _whole_numbers(value, name)
        if target is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if target is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            if abs(float(value)) > LARGEST:
                raise UserError(f"{name}={value} is beyond the numbers that tokens are counted in, at most {LARGEST}")
            return int(float(value))
        if target is float:
            if isinstance(value, bool) or not isfinite(float(value)):
                raise ValueError
            return float(value)
        if target is str and isinstance(value, float) and value.is_integer():
            return str(int(value))
        return target(value) if target is str else value
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError):
        names = {
            "int": "a whole number",
            "float": "a finite number",
            "bool": "True or False",
        }
        wanted = names.get(target.__name__, target.__name__)
        raise UserError(f"{name}={value!r} must be {wanted}") from None


def _whole_numbers(value: Any, name: str) -> tuple[int, ...]:
    """0, [0, 1], "[0,1]" or "0;1" as a tuple."""
    if isinstance(value, str):
        value = [v for v in value.strip("[]() ").replace(";", ",").split(",") if v.strip()]
    values = value if isinstance(value, (list, tuple)) else [value]
    try:
        return tuple(coerce(v, int, name) for v in values)
    except UserError as error:
        raise UserError(f"{name}={value!r} must be whole numbers, as [0,1]: {error}") from None

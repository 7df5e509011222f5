"""The official LongBench scorers, one file each: `score(prediction, reference, all_classes) -> float` in [0, 1].

A task YAML names the file (`metric: rouge`), or any importable function as `package.module:function`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from kv_lm_eval.errors import UserError, close_names

NEEDS_CLASSES = "NEEDS_CLASSES"  # a scorer's module sets it True where a score without all_classes means nothing
Scorer = Callable[[str, str, "Sequence[str] | None"], float]


def available() -> list[str]:
    """Names of the scorers in this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))


def load(name: str) -> Scorer:
    """Returns the scorer of that name.

    Raises:
        UserError: there is none.
    """
    if ":" in name:
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)
    if name not in available():
        raise UserError(
            f"metric {name!r} is not one of: {', '.join(available())}{close_names(name, available())}; a function of "
            "your own is named as package.module:function"
        )
    return importlib.import_module(f"{__name__}.{name}").score


def needs_classes(name: str) -> bool:
    """Whether a row or prediction scored by this metric must say all_classes."""
    return bool(getattr(importlib.import_module(load(name).__module__), NEEDS_CLASSES, False))

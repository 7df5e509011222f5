"""Which methods there are, by the names of their files, so that a misspelt one is told before torch is imported."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from kv_lm_eval.errors import UserError, close_names

PARTS = {
    "base",
    "budget",
    "schedule",
    "evicted",
    "treatments",
    "storage",
    "storages",
    "unit",
    "compression",
    "head_profile",
    "names",
    "voting",
}


def available() -> list[str]:
    """Names of the bundled methods: every module of this package that defines one, without importing it.

    A trailing underscore is dropped, so that `random_.py` does not shadow the standard library's `random`.
    """
    return sorted(
        m.name.rstrip("_")
        for m in pkgutil.iter_modules([str(Path(__file__).parent)])
        if m.name not in PARTS and not m.name.startswith("_")
    )


def check(spec: str) -> str:
    """The name of a bundled method, or `path/to/file.py[:Class]` as it stands.

    Raises:
        UserError: no such method.
    """
    name = spec.lower().replace("-", "_")
    if ".py" not in spec and name not in available():
        raise UserError(
            f"method={spec} is not known{close_names(name, available())}. Available: {', '.join(available())}. "
            "Your own method: method=path/to/file.py:ClassName."
        )
    return spec if ".py" in spec else name

"""Keeps the answers in lm-eval's --use_cache file apart by model and method.

lm-eval's own key holds the request only, so that a compressed run would be answered from a full one. Here every
configuration has a table of its own in the same sqlite file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(what: dict[str, Any]) -> str:
    """Hash of everything that decides an answer."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def weights_identity(pretrained: Any, model: Any) -> list[Any]:
    """Tells retrained weights of one name apart: sizes and times of a folder's files, a sum of weights in memory."""
    if not isinstance(pretrained, str):
        return [model.config.to_json_string(), sum(float(p.double().sum()) for p in model.parameters())]
    folder = Path(pretrained)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def count_answers(dbdict: Any) -> None:
    """Lets lm-eval's SqliteDict count in `answers` how many requests it has answered: the model never sees those."""

    class Counting(type(dbdict)):  # type: ignore[misc]
        answers = 0

        def __getitem__(self, key: str) -> Any:
            found = super().__getitem__(key)
            self.answers += 1
            return found

    dbdict.__class__ = Counting


def use_own_table(dbdict: Any, fingerprint: str) -> None:
    """Points lm-eval's SqliteDict at the table of this configuration."""
    dbdict.tablename = f"kv_{fingerprint[:32]}"
    dbdict.conn.execute(f'CREATE TABLE IF NOT EXISTS "{dbdict.tablename}" (key TEXT PRIMARY KEY, value BLOB)')
    dbdict.conn.commit()

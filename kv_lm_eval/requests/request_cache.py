"""Keeps the answers in lm-eval's --use_cache file apart by model and settings, as JSON that cannot run anything.

lm-eval's own key holds the request only, so that a compressed run would be answered from a full one, and its values are
pickles, which run code when they are read. Here every identity has a table of its own in the same sqlite file, and an
answer is text. One that is damaged is no answer: it is asked again.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from typing_extensions import TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import OUT_OF_MEMORY, UserError
from kv_lm_eval.requests.documents import DocumentRecord, DocumentScore

log = logging.getLogger("lm_eval.models.kvcompressed")
ARRAYS = {"tokens": "int32", "log_probs": "float32", "greedy": "bool", "slots": "int32"}


class Answer(TypedDict, total=False):
    """One kept answer: exactly one of these."""

    text: str  # generate_until
    number: float  # loglikelihood_rolling
    pair: tuple[float, bool]  # loglikelihood
    document: dict[str, Any]  # loglikelihood_rolling with its record


def encode(answer: Any) -> str:
    """An answer as JSON; floats and arrays keep every bit."""
    if isinstance(answer, str):
        return json.dumps({"text": str(answer)})
    if isinstance(answer, DocumentScore):
        record = dict(vars(answer.record))
        for name in ARRAYS:
            record[name] = None if record[name] is None else _packed(record[name])
        return json.dumps({"document": record})
    if isinstance(answer, (tuple, list)):
        number, flag = answer
        return json.dumps({"pair": [float(number), bool(flag)]})
    return json.dumps({"number": float(answer)})


def decode(text: Any) -> Any:
    """The answer.

    Raises:
        UserError: it is not one.
    """
    if not isinstance(text, str):
        raise UserError("a kept answer is not text")
    raw = files.parse_json(text, "a kept answer")
    if isinstance(raw, dict) and isinstance(raw.get("pair"), list):
        raw["pair"] = tuple(raw["pair"])
    kept = files.check(raw, Answer, "a kept answer")
    if len(kept) != 1:
        raise UserError("a kept answer is not one")
    ((kind, value),) = kept.items()
    return _document(value) if kind == "document" else value


def _packed(array: np.ndarray) -> list[str]:
    return [str(array.dtype), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")]


def _document(value: dict[str, Any]) -> DocumentScore:
    try:
        record = {f.name: value[f.name] for f in dataclasses.fields(DocumentRecord)}
        for name, dtype in ARRAYS.items():
            if record[name] is not None:
                given, packed = record[name]
                if np.dtype(given).kind != np.dtype(dtype).kind:
                    raise ValueError(given)
                record[name] = np.frombuffer(base64.b64decode(packed, validate=True), dtype=np.dtype(given)).copy()
        lengths = {len(record[name]) for name in ARRAYS if record[name] is not None}
        record["evictions"] = [(int(a), int(b)) for a, b in record["evictions"]]
        if len(lengths) != 1:
            raise ValueError("arrays of several lengths")
        return DocumentScore(DocumentRecord(**record))
    except (KeyError, ValueError, TypeError, pydantic.ValidationError) as error:
        raise UserError(f"a kept answer is no document: {error}") from None


# ---------------------------------------------------------------------------------------------------- lm-eval's file


def use_own_table(dbdict: Any, identity: str) -> None:
    """Points lm-eval's SqliteDict at the table of this identity; from then on it counts its answers in `answers`.

    Raises:
        UserError: the file is damaged.
    """
    check_file(Path(dbdict.filename))
    dbdict.tablename = f"kv_{identity[:32]}"
    dbdict.encode, dbdict.decode = encode, decode
    dbdict.conn.execute(f'CREATE TABLE IF NOT EXISTS "{dbdict.tablename}" (key TEXT PRIMARY KEY, value BLOB)')
    # Tried again, perhaps on a larger device
    dbdict.conn.execute(f'DELETE FROM "{dbdict.tablename}" WHERE value = ?', (encode(OUT_OF_MEMORY),))
    dbdict.conn.commit()
    dbdict.__class__ = _counting(type(dbdict))


def _counting(kind: type) -> type:
    class Counting(kind):
        """The model never sees the requests that are answered from the file."""

        answers = 0

        def __contains__(self, key: Any) -> bool:
            if not super().__contains__(key):
                return False
            try:
                super().__getitem__(key)
            except UserError as error:
                log.warning("%s: %s; the request is answered anew", self.filename, error)
                return False
            return True

        def __getitem__(self, key: str) -> Any:
            found = super().__getitem__(key)
            self.answers += 1
            return found

    return Counting


def check_file(file: Path) -> None:
    """Raises UserError where a --use_cache file is there and is no whole sqlite file."""
    if not file.exists() or not file.stat().st_size:
        return
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as conn:
            found = str(conn.execute("PRAGMA quick_check(1)").fetchone()[0])
    except (sqlite3.Error, OSError) as error:
        found = str(error)
    if found != "ok" and "locked" not in found:
        raise UserError(
            f"use_cache file {file} is damaged ({found}), so that none of its answers can be believed; remove it, or "
            "give another --use_cache"
        )

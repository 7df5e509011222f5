"""Answers on disk as JSON: lm-eval's --use_cache pickles them, and reading a pickle runs whatever code it names.

An answer is a text, a number, a pair (log-likelihood, greedy), with what the full cache says to it where that was
asked, or a DocumentScore with its record. They go into a table of their own beside lm-eval's, in the same sqlite file.
What is damaged is no answer.
"""

from __future__ import annotations

import base64
import json
import sqlite3
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from kv_lm_eval.errors import UserError
from kv_lm_eval.requests.document_scores import DocumentRecord, DocumentScore

ENDING = "_json"  # of such a table's name


def keep_as_json(dbdict: Any) -> None:
    """Has lm-eval's SqliteDict write and read JSON, in a table beside the one it has."""
    dbdict.tablename += ENDING
    dbdict.conn.execute(f'CREATE TABLE IF NOT EXISTS "{dbdict.tablename}" (key TEXT PRIMARY KEY, value BLOB)')
    dbdict.conn.commit()
    dbdict.encode, dbdict.decode = encode, lambda text: decode(text, dbdict.filename)


def encode(answer: Any) -> str:
    """An answer as JSON; numbers and arrays keep every bit."""
    return json.dumps(_plain(answer))


def decode(text: Any, place: str) -> Any:
    """The answer that `encode` was given; `place` begins the error's message.

    Raises:
        UserError: it is none, as of a damaged file.
    """
    try:
        if not isinstance(text, str):  # a pickle, say
            raise TypeError(type(text).__name__)
        match json.loads(text):
            case str() as answer:
                return answer
            case float() | int() as answer if not isinstance(answer, bool):
                return answer
            case [float() | int() as number, bool() as greedy] if not isinstance(number, bool):
                return number, greedy
            case {"document": dict() as document}:
                return _document(document)
            case {"answer": str() | [float() | int(), bool()] as answer, "beside": dict() as beside}:
                return _compared(answer, beside)
        raise ValueError("no answer")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UserError(
            f"{place}: an answer in it is damaged; delete the file, and its requests are run again"
        ) from None


def is_whole(file: Path) -> bool:
    """Whether a file of answers can be read to its end."""
    if damage(file):
        return False
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as found:
            names = found.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            for (name,) in names:
                if str(name).endswith(ENDING):
                    for (value,) in found.execute(f'SELECT value FROM "{name}"'):
                        decode(value, str(file))
    except (sqlite3.Error, UserError, OSError):
        return False
    return True


def damage(file: Path) -> str:
    """What is wrong with a sqlite file, whatever it holds; empty for a whole one and for one that is not there yet."""
    try:
        if not file.exists() or not file.stat().st_size:
            return ""
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as found:
            said = str(found.execute("PRAGMA quick_check(1)").fetchone()[0])
    except (sqlite3.Error, OSError) as error:
        said = str(error)
    return "" if said == "ok" or "locked" in said else said


def _plain(value: Any) -> Any:
    if isinstance(value, DocumentScore):
        record = value.record
        return {"document": {field.name: _plain_field(getattr(record, field.name)) for field in fields(record)}}
    if (beside := getattr(value, "beside", None)) is not None:  # with fidelity=True
        answer = str(value) if isinstance(value, str) else [_plain(one) for one in value]
        return {"answer": answer, "beside": {name: _plain_field(one) for name, one in beside.parts().items()}}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _plain_field(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode("ascii")
        return {"dtype": value.dtype.str, "shape": list(value.shape), "base64": data}
    return value


def _document(stored: dict[str, Any]) -> Any:
    record = DocumentRecord(**{name: _field(value) for name, value in stored.items()})
    beside = [x for x in (record.kl, record.base_log_probs, record.same_top) if x is not None]
    if {len(x) for x in (record.log_probs, record.greedy, *beside)} != {len(record.tokens)}:
        raise ValueError("arrays of several lengths")
    return DocumentScore(record)


def _compared(answer: Any, beside: dict[str, Any]) -> Any:
    from kv_lm_eval.requests.beside import Beside
    from kv_lm_eval.requests.samples import Choice, Text

    found = Beside.of({name: _field(value) for name, value in beside.items()})
    return Text(answer, beside=found) if isinstance(answer, str) else Choice((answer[0], answer[1]), beside=found)


def _field(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"dtype", "shape", "base64"}:
        dtype = np.dtype(value["dtype"])
        if dtype.hasobject:
            raise ValueError("an array of Python objects")
        return np.frombuffer(base64.b64decode(value["base64"], validate=True), dtype).reshape(value["shape"]).copy()
    if isinstance(value, list) and value and all(isinstance(one, list) for one in value):
        return [tuple(one) for one in value]  # evictions
    return value

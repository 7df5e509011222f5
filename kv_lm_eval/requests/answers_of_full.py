"""The full cache's own greedy answers, asked for once a model and prompt, whatever method they are compared to.

They are kept for as long as the model object lives and, with --use_cache, in its sqlite file: in a table whose name
says the model and all else that decides the full cache's answers, and nothing of the method.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from kv_lm_eval.requests.samples import Text

log = logging.getLogger("lm_eval.models.kvcompressed")


class AnswersOfFull:
    """Answers by key."""

    def __init__(self) -> None:
        self._known: dict[str, Text] = {}
        self._conn: Any = None
        self._table = ""

    def keep_in(self, dbdict: Any, identity: str) -> None:
        """From now on also in the file of lm-eval's SqliteDict."""
        self._conn, self._table = dbdict.conn, f"kv_full_{identity[:32]}"
        self._conn.execute(f'CREATE TABLE IF NOT EXISTS "{self._table}" (key TEXT PRIMARY KEY, value TEXT)')
        self._conn.commit()

    @staticmethod
    def key(prompt: Sequence[int], settings: str) -> str:
        """Of a prompt's tokens and what its answer may be."""
        return hashlib.sha256(json.dumps([list(prompt), settings]).encode()).hexdigest()

    def get(self, key: str) -> Text | None:
        """An answer with its tokens; None: it is not known."""
        if key not in self._known and self._conn is not None:
            row = self._conn.select_one(f'SELECT value FROM "{self._table}" WHERE key = ?', (key,))
            if row is not None and (found := _read(row[0])) is not None:
                self._known[key] = found
        return self._known.get(key)

    def put(self, key: str, answer: Text) -> None:
        """Keeps an answer."""
        self._known[key] = Text(answer, tokens=answer.tokens)
        if self._conn is not None:
            value = json.dumps({"text": str(answer), "tokens": list(answer.tokens)})
            self._conn.execute(f'REPLACE INTO "{self._table}" (key, value) VALUES (?, ?)', (key, value))
            self._conn.commit()


def _read(value: Any) -> Text | None:
    try:
        stored = json.loads(value)
        text, tokens = stored["text"], stored["tokens"]
        if isinstance(text, str) and tokens and all(type(token) is int for token in tokens):
            return Text(text, tokens=tokens)
    except (ValueError, TypeError, KeyError):
        pass
    log.warning("an answer of the full cache in the --use_cache file is damaged; its prompt is run again")
    return None

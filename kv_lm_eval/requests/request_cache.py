"""Keeps the answers in lm-eval's --use_cache file apart by model and settings.

lm-eval's own key holds the request only, so that a compressed run would be answered from a full one. Here every
identity (identity.py) has a table of its own in the same sqlite file. An answer that is damaged is asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kv_lm_eval.errors import OUT_OF_MEMORY, UserError
from kv_lm_eval.requests import kept_answers

log = logging.getLogger("lm_eval.models.kvcompressed")


@dataclass
class Made:
    """Answers of this process that count as made by a run, with all that is known of them, though another made them.

    Attributes:
        answers: by lm-eval's key. noting: whether what is written to the file is to be one of them.
    """

    answers: dict[str, Any] = field(default_factory=dict)
    noting: bool = False


def use_own_table(dbdict: Any, identity: str, answered: Callable[[], None], made: Made) -> None:
    """Points lm-eval's SqliteDict at the table of this identity.

    Args:
        answered: called for every answer that is taken from it.
        made: looked at before the file.

    Raises:
        UserError: the file is damaged.
    """
    check_file(Path(dbdict.filename))
    dbdict.tablename = f"kv_{identity[:32]}"
    kept_answers.keep_as_json(dbdict)
    # Tried again, perhaps on a larger device
    again = (kept_answers.encode(OUT_OF_MEMORY),)
    dbdict.conn.execute(f'DELETE FROM "{dbdict.tablename}" WHERE value = ?', again)
    dbdict.conn.commit()
    dbdict.__class__ = _counting(type(dbdict), answered, made)


def check_file(file: Path) -> None:
    """Raises UserError where a --use_cache file is there and is no whole sqlite file."""
    if found := kept_answers.damage(file):
        raise UserError(
            f"use_cache file {file} is damaged ({found}), so that none of its answers can be believed; remove it, or "
            "give another --use_cache"
        )


def _counting(kind: type, answered: Callable[[], None], made: Made) -> type:
    class Counting(kind):
        """The model never sees the requests that are answered from the file."""

        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            if made.noting:
                made.answers[key] = value

        def __contains__(self, key: Any) -> bool:
            if key in made.answers:
                return True
            if not super().__contains__(key):
                return False
            try:
                super().__getitem__(key)
            except UserError:
                log.warning("%s: an answer in it is damaged; its request is run again", self.filename)
                return False
            return True

        def __getitem__(self, key: str) -> Any:
            if key in made.answers:
                return made.answers[key]
            found = super().__getitem__(key)
            answered()
            return found

    return Counting

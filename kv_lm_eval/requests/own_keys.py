"""--use_cache where words alone do not decide an answer: with question_in_prompt=False its document does too.

lm-eval looks an answer up by the request's texts and settings, before the model sees the request. Here it finds none,
and the model looks itself, by all that decides the answer.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from lm_eval.api.model import hash_args


class OwnKeys:
    """The answers in lm-eval's SqliteDict, which is closed to lm-eval itself from then on."""

    def __init__(self, dbdict: Any) -> None:
        self._kept, kind = dbdict, type(dbdict)

        class Closed(kind):  # type: ignore[misc, valid-type]
            def __contains__(self, key: Any) -> bool:
                return False

            def __setitem__(self, key: Any, value: Any) -> None:
                pass

        self._kind = kind
        dbdict.__class__ = Closed

    def get(self, kind: str, args: tuple[Any, ...], more: Hashable) -> Any:
        """The answer of a request, None where it is not known or drawn anew each time."""
        sampled = kind == "generate_until" and args[1].get("do_sample", False)
        key = hash_args(kind, [*args, more])
        return None if sampled or not self._kind.__contains__(self._kept, key) else self._kept[key]

    def put(self, kind: str, args: tuple[Any, ...], more: Hashable, answer: Any) -> None:
        """Keeps an answer."""
        self._kind.__setitem__(self._kept, hash_args(kind, [*args, more]), answer)

"""Errors meant for the person at the keyboard.

Every message says what was got, what is allowed, what would happen, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What stands in place of an answer whose request ran out of memory, for tasks whose documents say `takes_failures`.
OUT_OF_MEMORY = "<out of memory>"
WHICH_MODEL = "which model? Add pretrained=NAME to --model_args (pretrained=kv-tiny is embedded)"


class UserError(ValueError):
    """A wrong setting or an unusable model or input: the message is the whole story, no traceback needed."""


def close_names(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Returns `` (did you mean 'a' or 'b'?)``, or an empty string if nothing known resembles `name`."""
    close = difflib.get_close_matches(name.lower(), sorted(known), n=limit, cutoff=0.6)
    if not close:
        return ""
    return " (did you mean " + " or ".join(f"'{c}'" for c in close) + "?)"

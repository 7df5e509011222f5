"""Keeps two remarks of lm-eval that are no news off the screen of whoever runs our model or our tasks.

One tells, for every task with documents of its own making, that settings can be given; our tasks' READMEs do. The other
is git's "fatal: not a git repository", in the middle of a progress bar, wherever a run is not started in one.
What lm-eval says of other tasks is shown as before, and runs without our model and tasks are left alone.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

OURS = "kv_"  # what the names of our tasks begin with
REMARK = ": Custom kwargs can be passed"


def install() -> None:
    """For this process; a second call does nothing."""
    logger = logging.getLogger("lm_eval.api.task")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
    from lm_eval.loggers import utils

    # The evaluator has taken the function by its name, if it is there already.
    for module in filter(None, (utils, sys.modules.get("lm_eval.evaluator"))):
        original = getattr(module, "get_git_commit_hash", None)
        if original is not None and not hasattr(original, "asks_quietly"):
            module.get_git_commit_hash = _asking_quietly(original)


def _is_news(record: logging.LogRecord) -> bool:
    text = str(record.msg)
    return not (text.startswith(OURS) and REMARK in text)


def _asking_quietly(original: Callable[[], Any]) -> Callable[[], Any]:
    """The same answer; where git has no commit to tell, it is not asked again aloud."""

    @functools.wraps(original)
    def commit() -> Any:
        try:
            tried = subprocess.run(["git", "describe", "--always"], capture_output=True, check=False)
        except OSError:  # no git on this machine
            return original()
        if tried.returncode == 0:
            return original()
        from lm_eval.loggers.utils import get_commit_from_path

        return get_commit_from_path(os.getcwd())

    commit.asks_quietly = True  # type: ignore[attr-defined]
    return commit

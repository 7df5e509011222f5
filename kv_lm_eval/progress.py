"""Bars that say what is left: as tqdm draws them on a terminal, one line a minute in a log.

A long run's log would otherwise hold thousands of redrawn bars on one line, or nothing for hours where its output is
kept in a file of its own, as in a sweep.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

SECONDS = 60.0  # between two lines of a log
_live: list[Bar] = []


class Bar(tqdm):
    """tqdm, except that without a terminal each state is a line, at most one a minute."""

    disable: bool

    def __init__(self, *args: Any, file: TextIO | None = None, **kwargs: Any) -> None:
        file = file or sys.stderr
        self.lines, self.told_at = not _is_terminal(file), 0.0
        super().__init__(*args, file=file, **kwargs)
        if self.disable is False:
            _live.append(self)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draws the bar, or writes its line."""
        if not self.lines:
            return super().display(msg, pos)
        now, ended = time.monotonic(), self.n >= (self.total or 0)
        if not self.told_at or now - self.told_at >= SECONDS or (ended and self.told_at < math.inf):
            self.fp.write(f"{self.told()}\n")
            self.fp.flush()
            self.told_at = math.inf if ended else now
        return True

    def clear(self, nolock: bool = False) -> None:
        """Takes the bar off a terminal for a moment; lines stay."""
        if not self.lines:
            super().clear(nolock)

    def close(self) -> None:
        """Ends the bar."""
        if self in _live:
            _live.remove(self)
        if self.lines and not self.disable:
            self.display()
            self.disable = True
            self._decr_instances(self)
        super().close()

    def told(self) -> str:
        """How far it is and what is left, in words."""
        state = self.format_dict
        unit = "" if state["unit"] == "it" else f" {state['unit']}"
        text = f"{self.desc.removesuffix(': ') or 'progress'}: {_number(self.n)} of {_number(self.total or 0)}{unit}"
        text += f", {clock(state['elapsed'])} so far"
        if 0 < self.n < (self.total or 0):
            text += f", about {clock(state['elapsed'] * (self.total - self.n) / self.n)} left"
        return text + (f" ({self.postfix})" if getattr(self, "postfix", None) else "")


def innermost() -> str:
    """The state of the bar that was begun last, "" without one."""
    return _live[-1].told() if _live else ""


@contextmanager
def told_every_minute(line: Callable[[], str], file: TextIO | None = None, bar: Bar | None = None) -> Iterator[None]:
    """Inside, a line a minute goes to a stream (stderr as it is now), also while bars go elsewhere.

    Args:
        bar: whose lines these are instead of its own; nothing is told beside one on a terminal.
    """
    if bar is not None and not bar.lines:
        yield
        return
    out, done = file or sys.stderr, threading.Event()

    def tell() -> None:
        while not done.wait(SECONDS):
            if bar is not None and bar.told_at < math.inf:
                bar.told_at = time.monotonic()
            print(line(), file=out, flush=True)

    thread = threading.Thread(target=tell, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=1)


def clock(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _is_terminal(file: Any) -> bool:
    try:
        return bool(file.isatty())
    except (AttributeError, ValueError):
        return False

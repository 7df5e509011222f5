"""How every command begins and ends: one line instead of a traceback, a signal that says what is kept, a true status.

0: what was asked for is on disk and whole. 1: not all of it, or something broke that nobody foresaw. 2: a mistake in
what was asked. 130, 143, 129: stopped by Ctrl-C, SIGTERM, SIGHUP. 141: the reader of the output went away.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from kv_lm_eval.errors import UserError, close_names

SHOW_TRACEBACK = "KV_LM_EVAL_TRACEBACK"
# What these packages raise about what they were given is a mistake in it, not in us.
CHECKING = ("lm_eval", "datasets", "huggingface_hub")
EXPECTED = (ValueError, TypeError, LookupError, OSError, AssertionError, ImportError)


class Help(argparse.HelpFormatter):
    """Prose as wide as the terminal; what is indented stands as it was written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if any(line.startswith(" ") for line in part.splitlines()) else textwrap.fill(part, width)
            for part in text.strip("\n").split("\n\n")
        )


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one line, with the option that was meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Help, **kwargs})
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        refuse(self, message)


def _path(text: str) -> Path:
    if not text:  # which Path takes for the current folder
        raise argparse.ArgumentTypeError("is empty; is a variable of the shell not set?")
    return Path(text)


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between them.

    Raises:
        UserError: something else.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r}: whole numbers were expected, with commas between them") from None


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """What argparse calls an error, as a UserError that names the option which was perhaps meant."""
    message = re.sub(r"invalid [^ ]*[(_<].* value: ", "invalid value: ", message)  # the name of a function of theirs
    unknown = message.removeprefix("unrecognized arguments: ").split()
    near = close_names(unknown[0].split("=")[0], _options(parser)) if message.startswith("unrecognized") else ""
    name = parser.prog.replace("lm-eval", "kv-lm-eval").replace("kv-kv-", "kv-")
    raise UserError(f"{message}{near}; `{name} --help` says what there is")


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Of a parser and of those below it."""
    below = [p for a in parser._actions if isinstance(a, argparse._SubParsersAction) for p in a.choices.values()]
    return {o for a in parser._actions for o in a.option_strings if o.startswith("--")}.union(*map(_options, below))


class Stopped(KeyboardInterrupt):
    """Another signal than Ctrl-C asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def command(name: str, work: Callable[[], int], kept: Callable[[], str] = str, lists: bool = False) -> int:
    """Runs a command and returns its exit status, whatever happens in it.

    Args:
        name: begins every message.
        work: the command; returns its own status.
        kept: what to say after a signal: what is on disk, and how to go on.
        lists: it only prints, so that a reader who has enough (`| head`) has got what was asked for.
    """
    try:
        with stoppable():
            status = work()
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if lists:
            return 0
        say(f"{name} stopped: whoever read its output went away. {kept()}".rstrip())
        return 141
    except UserError as error:
        say(f"{name} stopped: {error}")
        return 2
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        say(f"{name} stopped by {by}. {kept()}".rstrip())
        return 128 + number
    except Exception as error:
        if os.environ.get(SHOW_TRACEBACK, "0") not in ("", "0"):
            raise
        mistake = _is_about_the_input(error)
        say(f"{name} stopped: {_words(error) if mistake else _and_where(error)}. {kept()}".rstrip())
        return 2 if mistake else 1


def say(message: str) -> None:
    """A message on stderr, set off from bars and logs; further lines of it are indented."""
    first, *more = message.strip().splitlines()
    print("\n".join([f"\n{first}", *(textwrap.indent(line, "  ") for line in more)]), file=sys.stderr, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as an aligned text table."""
    heads = list(rows[0])
    widths = [max(len(h), *(len(str(r[h])) for r in rows)) for h in heads]
    lines = [
        "  ".join(h.ljust(w) if i == 0 else h.rjust(w) for i, (h, w) in enumerate(zip(heads, widths, strict=True)))
    ]
    lines.append("  ".join("-" * w for w in widths))
    for r in rows:
        cells = [str(r[h]) for h in heads]
        lines.append(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        )
    return "\n".join(lines)


@contextmanager
def quietly() -> Iterator[None]:
    """Holds back lm-eval's bars and notes, and lets them out if something goes wrong."""
    noise = io.StringIO()
    try:
        with redirect_stderr(noise), redirect_stdout(noise):
            yield
    except UserError:  # its message says all
        raise
    except Exception:
        print(f"failed\n{noise.getvalue()[-4000:]}", file=sys.stderr)
        raise


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first Ctrl-C, SIGTERM or SIGHUP raises, so that what is open is closed; the second ends at once.

    Signals that somebody else handles or ignores (nohup, a launcher) are left to them.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number, usual in _stopping().items():
            if signal.getsignal(number) == usual:
                before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _stop:  # after a stop the second one still ends at once
                signal.signal(number, handler)


def _stopping() -> dict[signal.Signals, Any]:
    usual: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    return usual | ({signal.SIGHUP: signal.SIG_DFL} if hasattr(signal, "SIGHUP") else {})


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)


def _is_about_the_input(error: BaseException) -> bool:
    """Whether the line that raised stands in a package that checks what it is given."""
    frames = list(traceback.walk_tb(error.__traceback__))
    package = frames[-1][0].f_globals.get("__name__", "").split(".")[0] if frames else ""
    if type(error).__module__.split(".")[0] == "yaml":  # of a task's file, which lm-eval reads
        return True
    return package in CHECKING and isinstance(error, EXPECTED)


def _words(error: BaseException) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:1000].rstrip(".") or type(error).__name__


def _and_where(error: BaseException) -> str:
    """What broke; the traceback goes into a file, for whoever mends it."""
    what = f"{type(error).__name__}: {_words(error)}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="kv-lm-eval-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as out:
            traceback.print_exception(error, file=out)
    except OSError:
        return f"{what} ({SHOW_TRACEBACK}=1 shows where)"
    return f"{what} (where it happened: {out.name})"


def print_user_errors_in_one_line() -> None:
    """Under `lm_eval`'s own command a UserError that nobody catches is its message, without the traceback above it."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: object) -> None:
        if isinstance(error, UserError):
            say(f"lm_eval stopped: {error}")
        else:
            previous(kind, error, trace)  # type: ignore[arg-type]

    sys.excepthook = hook

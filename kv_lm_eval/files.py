"""Files: read against a schema, believed only when they are whole, written whole or not at all.

Everything that is read back comes through here, so that a damaged file is one line that names file, line and field.
A schema is a type that pydantic can check as it stands: a TypedDict (from typing_extensions), `dict[str, list[int]]`, a
union, `Any`. Nothing is converted on the way: a string where a list was meant is an error, not a list of letters; only
a whole number may stand for a float.

Text is UTF-8; a byte order mark at its beginning is left out and every kind of line end becomes "\\n", whatever wrote
it.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from kv_lm_eval.errors import UserError

T = TypeVar("T")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file, without a byte order mark, line ends as "\\n".

    Raises:
        UserError: no such file, not readable, or not UTF-8.
    """
    return as_text(_read_bytes(Path(path)), str(path))


def as_text(raw: bytes, place: str) -> str:
    """The text of a file's bytes, as `read_text`; `place` begins the error's message."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{place}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], schema: type[T] | Any = Any) -> Any:
    """The one JSON value of a file, checked against the schema.

    Raises:
        UserError: no such file, cut off, not JSON, or not what the schema says; names file, line or field.
    """
    text = read_text(path)
    return check(parse_json(text, str(path)), schema, str(path))


def read_jsonl(path: str | os.PathLike[str], schema: type[T] | Any = Any) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line of a JSON-lines file that is not blank, checked against the schema.

    Raises:
        UserError: as `read_json`, at the line that is wrong; earlier lines have been yielded.
    """
    yield from parse_jsonl(read_text(path), str(path), schema)


def parse_jsonl(text: str, place: str, schema: type[T] | Any = Any) -> Iterator[tuple[int, Any]]:
    """`read_jsonl` of a text that is there already; `place` begins the error's message."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            at = f"{place}, line {number}"
            yield number, check(parse_json(line, at), schema, at)


def read_yaml(path: str | os.PathLike[str], schema: type[T] | Any = Any) -> Any:
    """The one YAML value of a file (plain values only: nothing in it can run), checked against the schema.

    Raises:
        UserError: as `read_json`.
    """
    return check(parse_yaml(read_text(path), str(path)), schema, str(path))


def parse_json(text: str, place: str) -> Any:
    """The JSON value of a text; `place` begins the error's message."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise UserError(f"{place}: is empty, JSON was expected") from None
        at = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        what = error.msg.removesuffix(" at")  # of some messages of Python's
        raise UserError(f"{place}: not whole JSON ({what} at {at}); it may be cut off or not be JSON") from None
    except RecursionError:
        raise UserError(f"{place}: JSON nested too deeply") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise UserError(f"{place}: not usable JSON ({error})") from None


def parse_yaml(text: str, place: str) -> Any:
    """The YAML value of a text; `place` begins the error's message."""
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{place}{at}: not valid YAML: {reason}") from None


def check(value: Any, schema: Any, place: str) -> Any:
    """The value as the schema types it; `place` begins the error's message.

    Raises:
        UserError: what is missing or of the wrong type, by its place within the value.
    """
    try:
        return _adapter(schema).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise UserError(f"{place}: {_in_words(error)}") from None


@functools.lru_cache(maxsize=256)
def _adapter(schema: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(schema)


TYPES = ("function-", "is-instance", "list[", "dict[", "tuple[")  # where pydantic names one of several types as a place


def _in_words(error: pydantic.ValidationError, most: int = 3) -> str:
    found = error.errors(include_url=False, include_context=False)
    parts = []
    for one in found[:most]:
        where = ".".join(str(p) for p in one["loc"] if not str(p).startswith(TYPES))
        got = "" if one["type"] == "missing" else f", got {_short(one['input'])}"
        message = one["msg"][0].lower() + one["msg"][1:]
        parts.append(f"{where}: {message}{got}" if where else f"{message}{got}")
    more = f" (and {len(found) - most} more)" if len(found) > most else ""
    return "; ".join(parts) + more


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a file was expected") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------------------- writing


def write_whole(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Puts data in the place of a file at once: beside it, flushed to the disk, then renamed.

    Whoever reads the file finds the old content or the new one, never a part, whenever this process is killed. A text
    is written as UTF-8 with "\\n" as it stands; half a surrogate pair becomes "?".

    Raises:
        UserError: it could not be written; the old file is as it was and nothing is left beside it.
    """
    path = Path(path)
    raw = data if isinstance(data, bytes) else data.encode("utf-8", errors="replace")
    beside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
        beside = Path(name)
        with io.FileIO(handle, "w") as out:
            view = memoryview(raw)
            while view:
                view = view[out.write(view) :]
            os.fsync(out.fileno())
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        if beside is not None:
            with contextlib.suppress(OSError):
                beside.unlink()
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 2) -> None:
    """`write_whole` of a JSON value with a line end."""
    write_whole(path, json.dumps(value, indent=indent, ensure_ascii=False, default=str) + "\n")


def append_line(path: str | os.PathLike[str], text: str) -> None:
    """Adds one line to a file, on the disk when this returns. A part of a line that a kill left at its end is cut off.

    Raises:
        UserError: it could not be written, or not all of it; then nothing of it is left.
    """
    raw = (text.replace("\n", " ") + "\n").encode("utf-8", errors="replace")
    try:
        with open(path, "a+b", buffering=0) as out:
            end = _end_of_whole_lines(out)
            if end != out.seek(0, os.SEEK_END):
                out.truncate(end)
            try:
                view = memoryview(raw)
                while view:
                    view = view[out.write(view) :]
                os.fsync(out.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    out.truncate(end)
                raise
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error


def _end_of_whole_lines(file: io.FileIO, block: int = 65536) -> int:
    """The offset behind the last line end, 0 where there is none."""
    at = file.seek(0, os.SEEK_END)
    while at > 0:
        start = max(0, at - block)
        file.seek(start)
        found = file.read(at - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        at = start
    return 0


def check_is_folder(path: str | os.PathLike[str]) -> None:
    """Raises UserError where a folder to read from is not there or is a file."""
    if not Path(path).is_dir():
        what = "is a file, a folder was expected" if Path(path).is_file() else "there is no such folder"
        raise UserError(f"{path}: {what}")


def check_folder(path: str | os.PathLike[str], what: str) -> None:
    """Makes a folder and tries to write in it, before work is done whose results shall go there.

    Args:
        what: the setting that named it, to begin the message.

    Raises:
        UserError: it is a file, lies under one, or cannot be written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".kv-lm-eval-try-") as probe:
            probe.write(b"x")
            probe.flush()
            os.fsync(probe.fileno())
    except FileExistsError:
        raise UserError(f"{what}={path}: is a file, a folder was expected; give another path") from None
    except NotADirectoryError:
        raise UserError(f"{what}={path}: a part of this path is a file, not a folder; give another path") from None
    except OSError as error:
        raise UserError(
            f"{what}={path}: cannot be written ({error.strerror or error}), so that the results would be lost; give "
            "another path"
        ) from None


def _umask() -> int:
    mask = os.umask(0o022)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

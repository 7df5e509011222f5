"""lm-eval's results and samples files, on disk and whole, or an error that says where they are instead.

lm-eval's EvaluationTracker writes them in place and turns every failure into a warning, so that a run whose results are
lost ends well. Here its two methods write elsewhere first; what they wrote is read back, put in its place at once
(`files.write_whole`) and read back again. Where that fails, everything goes into a folder of its own for temporary
files and the run ends with a UserError that names it.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

_every_model = False
_newest: Callable[[], Any] | None = None  # a weak reference to the tracker made last


@dataclass
class _State:
    """Of one tracker: the files in their place, the run's results and samples, and where they go in an emergency."""

    written: list[Path] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)
    rescue: Path | None = None


_states: weakref.WeakKeyDictionary[Any, _State] = weakref.WeakKeyDictionary()


def install() -> None:
    """Wraps lm-eval's tracker for runs of our model, once."""
    from lm_eval.loggers import EvaluationTracker as Tracker

    if hasattr(Tracker.save_results_aggregated, "wrapped_for_whole_files"):
        return
    for name, wrap in (
        ("__init__", _remembering),
        ("save_results_aggregated", _whole_results),
        ("save_results_samples", _whole_samples),
    ):
        wrapped = functools.wraps(getattr(Tracker, name))(wrap(getattr(Tracker, name)))
        wrapped.wrapped_for_whole_files = True  # type: ignore[attr-defined]
        setattr(Tracker, name, wrapped)


@contextmanager
def of_every_model() -> Iterator[None]:
    """Inside, the files of lm-eval's other models are written whole too."""
    global _every_model
    before, _every_model = _every_model, True
    try:
        yield
    finally:
        _every_model = before


def check_newest() -> None:
    """Tries the folder of the tracker made last, before weights are loaded for it.

    Raises:
        UserError: it cannot be written.
    """
    tracker = _newest() if _newest is not None else None
    if tracker is not None and tracker.output_path:
        check_output(tracker.output_path)


def written_last() -> list[Path]:
    """The files that the tracker made last has put in their place."""
    tracker = _newest() if _newest is not None else None
    return [] if tracker is None else list(_of(tracker).written)


def check_output(output_path: str | os.PathLike[str]) -> None:
    """Tries the folder in which lm-eval would write for an --output_path.

    Raises:
        UserError: it cannot be written.
    """
    files.check_folder(folder_of(output_path), "--output_path")


def folder_of(output_path: str | os.PathLike[str]) -> Path:
    """Where the files go: --output_path is a folder, or a .json file in one."""
    path = Path(output_path)
    return path.parent if path.suffix == ".json" else path


def save(results: dict[str, Any], tracker: Any) -> list[Path]:
    """Results and, if there are any, samples, as lm-eval's command line saves them; returns the files.

    Raises:
        UserError: not all could be written; says where all of them are.
    """
    install()
    with of_every_model():
        samples = results.get("samples") or {}
        tracker.save_results_aggregated(
            results={k: v for k, v in results.items() if k != "samples"}, samples=samples or None
        )
        for task, rows in samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)
    return list(_of(tracker).written)


# ---------------------------------------------------------------------------------------------- the wrapped methods


def _remembering(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        global _newest
        original(self, *args, **kwargs)
        _newest = weakref.ref(self)

    return init


def _whole_results(original: Callable[..., None]) -> Callable[..., None]:
    def save_results_aggregated(self: Any, results: dict[str, Any], samples: Any = None) -> None:
        if not _is_ours(self):
            return original(self, results, samples)
        if _of(self).rescue is None:
            _of(self).results, _of(self).samples = results, samples or {}
        _put(self, lambda: original(self, _encodable(results), samples), lambda file: _check_results(file, results))

    return save_results_aggregated


def _whole_samples(original: Callable[..., None]) -> Callable[..., None]:
    def save_results_samples(self: Any, task_name: str, samples: Any) -> None:
        if not _is_ours(self):
            return original(self, task_name, samples)

        def write() -> None:  # of copies, since lm-eval changes the samples as it writes them
            original(self, task_name, [_encodable(sample) for sample in samples])

        _put(self, write, lambda file: _check_samples(file, len(samples)))

    return save_results_samples


def _encodable(value: Any) -> Any:
    """A copy of the containers, with "?" for half a surrogate pair, which no file can hold."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", errors="replace").decode("utf-8")
    if type(value) in (list, tuple):
        return type(value)(map(_encodable, value))
    return {key: _encodable(part) for key, part in value.items()} if type(value) is dict else value


def _is_ours(tracker: Any) -> bool:
    source = tracker.general_config_tracker.model_source
    return bool(tracker.output_path) and (_every_model or source == "kvcompressed")


def _of(tracker: Any) -> _State:
    return _states.setdefault(tracker, _State())


def _put(tracker: Any, write: Callable[[], None], check: Callable[[Path], None]) -> None:
    """One file by lm-eval's own hand, checked, in its place; or everything in the rescue folder and an error."""
    try:
        _of(tracker).written.append(_staged(tracker, write, check))
    except UserError as error:
        if _of(tracker).rescue is not None:
            raise
        raise UserError(f"{error}. {_rescued(tracker)}") from error


def _staged(tracker: Any, write: Callable[[], None], check: Callable[[Path], None]) -> Path:
    asked, root = tracker.output_path, folder_of(tracker.output_path)
    reason, reasons = "", list[str]()
    for place in (None, root):  # the folder for temporary files; where that is full or missing, the one asked for
        try:
            with tempfile.TemporaryDirectory(prefix=".kv-lm-eval-", dir=place) as stage:
                tracker.output_path = stage if folder_of(asked) == Path(asked) else str(Path(stage) / Path(asked).name)
                with _told() as reasons:
                    write()
                found = [file for file in Path(stage).rglob("*") if file.is_file()]
                if len(found) != 1:
                    raise UserError(f"lm-eval wrote {len(found)} files in place of one")
                check(found[0])
                final, data = root / found[0].relative_to(stage), found[0].read_bytes()
        except (OSError, UserError) as error:
            reason = reason or "; ".join(reasons) or str(error)
            continue
        finally:
            tracker.output_path = asked
        files.write_whole(final, data)
        if final.read_bytes() != data:
            raise UserError(f"{final} does not hold what was written to it")
        return final
    raise UserError(f"the results for {asked} could not be written: {reason}")


def _rescued(tracker: Any) -> str:
    """Writes all results and samples of a run to a new folder for temporary files; says where, and prints the scores.

    The samples go through the tracker's outermost method, since others add to them there.
    """
    state, asked = _of(tracker), tracker.output_path
    _print_scores(state.results)
    try:
        state.rescue = Path(tempfile.mkdtemp(prefix="kv-lm-eval-results-"))
        tracker.output_path = str(state.rescue)
        tracker.save_results_aggregated(results=state.results, samples=state.samples or None)
        for task, rows in state.samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)
        return f"All results{' and samples' if state.samples else ''} are in {state.rescue} instead"
    except (OSError, UserError):
        if cache := (state.results.get("config") or {}).get("use_cache"):
            return (
                f"The answers are in {cache}_rank0.db: with room for the results, the same command goes on from there"
            )
        return "There was no room for them in the folder for temporary files either, so the answers are lost"
    finally:
        tracker.output_path, state.rescue = asked, None


def _print_scores(results: dict[str, Any]) -> None:
    """What lm-eval's command line would have printed after saving."""
    from lm_eval.utils import make_table

    if results.get("results"):
        print(make_table(results))


def _check_results(file: Path, results: Mapping[str, Any]) -> None:
    found = files.read_json(file, dict[str, Any])
    if missing := [task for task in results.get("results", {}) if task not in found.get("results", {})]:
        raise UserError(f"{file}: holds no results of {missing[0]}")


def _check_samples(file: Path, expected: int) -> None:
    lines = sum(1 for _ in files.read_jsonl(file, dict[str, Any]))
    if lines != expected:
        raise UserError(f"{file}: holds {lines} of {expected} samples")


@contextmanager
def _told() -> Iterator[list[str]]:
    """Keeps what lm-eval says of a write (where, and that it failed and why) for one message of ours."""
    log = logging.getLogger("lm_eval.loggers.evaluation_tracker")
    reasons: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "Error(" in text:
            reasons.append(text)
        return "Error(" not in text and not text.startswith(("Could not save", "Saving")) and record.levelno >= level

    level, before = log.getEffectiveLevel(), log.level
    log.setLevel(min(level, logging.INFO))
    log.addFilter(keep)
    try:
        yield reasons
    finally:
        log.removeFilter(keep)
        log.setLevel(before)


# ---------------------------------------------------------------------------------------------- what is whole


def fingerprints(written: Sequence[Path], folder: Path) -> dict[str, str]:
    """SHA-256 of files, by their path below a folder: what `damaged` compares with."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(written)
    }


def damaged(known: Mapping[str, str], folder: Path) -> str | None:
    """The first file that is gone or is not what it was, None if there is none."""
    for name, digest in known.items():
        try:
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return name
        except OSError:
            return name
    return None


def unreadable(folder: Path) -> str | None:
    """The first results or samples file below a folder that is cut off or no JSON, None if there is none."""
    for file in sorted([*folder.rglob("results_*.json"), *folder.rglob("samples_*.jsonl")]):
        try:
            _check_results(file, {}) if file.suffix == ".json" else list(files.read_jsonl(file, dict[str, Any]))
        except UserError:
            return file.relative_to(folder).as_posix()
    return None

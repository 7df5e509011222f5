"""One point of a sweep: a normal lm-eval run in a folder of its own, and a record of what became of it.

The run happens in this process, one after the other, so that torch and lm-eval are imported once; a point that raises
is recorded and the sweep goes on. What kills the process itself ends the sweep, and so does a full disk; it goes on at
the same point when it is started again. Under Ray the process is a worker, and its death is one point's failure.

A point is done when its record says so, and the record says so after its results and samples have been read back; only
then are the answers, with which an interrupted run goes on, removed. Nothing that is read back can run code.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import platform
import sqlite3
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kv_lm_eval import __version__, files, harness, plugin, saving
from kv_lm_eval.errors import UserError

DONE, FAILED, OUT_OF_MEMORY, RUNNING = "done", "failed", "out_of_memory", "running"
RECORD, LOG, ANSWERS, REQUESTS = "point.json", "log.txt", "answers", "requests.jsonl"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def folder_of(point: dict[str, Any], output: Path) -> Path:
    """Where a point's files are: found by its hash, so that a new name in the configuration loses nothing."""
    for found in sorted((output / "points").glob(f"*-{point['hash'][:8]}")):
        if read_record(found).get("hash") == point["hash"]:
            return found
    return output / "points" / point["id"]


def read_record(folder: Path) -> dict[str, Any]:
    """A point's record; empty where it was never started, or where the record is damaged and so says nothing."""
    try:
        return files.read_json(folder / RECORD, dict[str, Any]) if (folder / RECORD).is_file() else {}
    except UserError:
        return {}


def why_not_done(record: dict[str, Any], folder: Path) -> str | None:
    """None for a point that is done and whose files are still what they were; otherwise the reason."""
    if record.get("status") != DONE:
        return str(record.get("status") or "not started")
    known = record.get("files")
    if not isinstance(known, dict):  # of an earlier version
        name = saving.unreadable(folder) if (folder / str(record.get("results_file"))).is_file() else "results_*.json"
    else:
        name = saving.damaged(known, folder)
    return None if name is None else f"{name} is damaged or gone"


def run_point(point: dict[str, Any], folder: Path, lm: Any = None, resumed: bool | None = None) -> dict[str, Any]:
    """Runs one point and returns its record, which is also in its folder.

    Args:
        point: as in plan.json.
        folder: the point's own; what an interrupted run left there is used or cleared away.
        lm: the model under the point's settings, None: it is loaded here. resumed: whether the record says that an
            earlier run's answers were used, None: if there are any.

    Raises:
        UserError: there is no room on the disk, so that no point can be run.
    """
    import kv_lm_eval.model  # noqa: F401  (here, so that its seconds are not the first point's)

    folder.mkdir(parents=True, exist_ok=True)
    found = can_resume(folder, point["model"])
    clear_results(folder)
    record = {**point, "status": RUNNING, "error": None, "seconds": None, "results_file": None}
    record["resumed"] = found if resumed is None else resumed
    files.write_json(folder / RECORD, {**record, "versions": versions()})
    start = time.perf_counter()
    with captured(folder / LOG):
        try:
            written = _evaluate(point, folder, lm)
            record["status"] = DONE
        except (Exception, SystemExit) as error:
            if _is_no_room(error):
                raise UserError(
                    f"{point['name']}: {error}. Its answers so far are in {folder}; with room on the disk, the same "
                    "command goes on from there"
                ) from error
            record["status"] = OUT_OF_MEMORY if _is_out_of_memory(error) else FAILED
            record["error"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            traceback.print_exc()
    _free_memory()
    if record["status"] == DONE:
        record["seconds"] = round(time.perf_counter() - start, 2)
        (results,) = (file for file in written if file.suffix == ".json")
        record["results_file"] = results.relative_to(folder).as_posix()
        record["files"] = saving.fingerprints(written, folder)
    files.write_json(folder / RECORD, {**record, "versions": versions()})
    if record["status"] == DONE:
        tidy(folder)
    return record


def clear_results(folder: Path) -> None:
    """A run that was killed while it wrote may have left some of its files: the next one writes all of them."""
    for file in [*folder.rglob("results_*.json"), *folder.rglob("samples_*.jsonl"), *folder.rglob(".*.part")]:
        file.unlink()


def tidy(folder: Path) -> None:
    """Takes away what a point that is done needs no more, also where a kill came before that."""
    for file in [*folder.glob(f"{ANSWERS}_rank*"), folder / REQUESTS, *folder.rglob(".*.part")]:
        file.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    packages = ("lm_eval", "torch", "transformers")
    return {"kv-lm-eval": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}


def can_resume(folder: Path, model: str) -> bool:
    """Whether an interrupted run's answers can be used: they and the records of their requests, or neither."""
    from kv_lm_eval.requests import kept_answers

    kept, records = list(folder.glob(f"{ANSWERS}_rank*.db")), folder / REQUESTS
    has_records = records.is_file() or model != plugin.MODEL_NAME
    if kept and has_records and all(map(kept_answers.is_whole, kept)) and KeptLog.damage(records) is None:
        return True
    tidy(folder)
    return False


def sizes_of(point: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval's command line gives a model's constructor beside --model_args."""
    return {key: point[key] for key in ("batch_size", "max_batch_size", "device") if point[key] is not None}


def loaded(point: dict[str, Any]) -> Any:
    """The model of a point, under its settings."""
    plugin.install()
    from lm_eval.api.registry import get_model

    return get_model(point["model"]).create_from_arg_obj(dict(point["model_args"]), sizes_of(point))


def _evaluate(point: dict[str, Any], folder: Path, lm: Any = None) -> list[Path]:
    """The run itself; returns the results file and the samples files."""
    seeds = point["seed"] if isinstance(point["seed"], list) else [point["seed"]] * 4
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    seeded = {} if point["seed"] is None else dict(zip(names, seeds, strict=True))
    lm = loaded(point) if lm is None else lm
    if hasattr(lm, "compression_log"):
        lm.compression_log = KeptLog.of(lm.compression_log, folder / REQUESTS)
    else:
        _keep_answers_as_json(lm)
    run = harness.run(
        lm,
        point["model_args"],
        point["tasks"],
        output_path=folder,
        include_path=point["include_path"],
        metadata=point["metadata"],
        model_name=point["model"],
        use_cache=str(folder / ANSWERS),
        log_samples=True,
        **{key: point[key] for key in ("num_fewshot", "limit", "gen_kwargs", "system_instruction")},
        **{key: point[key] for key in ("bootstrap_iters", "batch_size", "max_batch_size", "device")},
        **{key: bool(point[key]) for key in ("confirm_run_unsafe_code",)},
        apply_chat_template=point["apply_chat_template"] or False,
        fewshot_as_multiturn=point["fewshot_as_multiturn"] is not False,
        **seeded,
    )
    assert run is not None, "a point is run by one process"
    print(run.said)
    return run.written


def _keep_answers_as_json(lm: Any) -> None:
    """Our own model does so by itself."""
    from kv_lm_eval.requests import kept_answers

    original = lm.set_cache_hook

    def set_cache_hook(hook: Any) -> None:
        kept_answers.keep_as_json(hook.dbdict)
        original(hook)

    lm.set_cache_hook = set_cache_hook


class KeptLog:
    """Mixed into a compression log so that it survives a kill: requests answered before it are in its statistics.

    Each batch is one line of JSON, on the disk before the model goes on. A last line without its end was being written
    and counts as not there; its requests have no answers either, since those are kept after their records.
    """

    file: Path
    before: set[Any]
    records: list[Any]

    @staticmethod
    def of(log: Any, file: Path) -> Any:
        """The log, kept in a file from now on, with the records that are there already."""
        from kv_lm_eval.metrics.compression import RequestRecord

        if isinstance(log, KeptLog) and log.file == file:
            return log

        log.__class__ = type("KeptLog", (KeptLog, type(log)), {})
        log.file = file
        log.records += [RequestRecord(**row) for batch in KeptLog._lines(file) for row in batch]
        log.before = {r.identity for r in log.records}
        return log

    @staticmethod
    def damage(file: Path) -> str | None:
        """What is wrong with a file of records, None for a whole one or none at all."""
        from kv_lm_eval.metrics.compression import RequestRecord

        try:
            for batch in KeptLog._lines(file):
                [RequestRecord(**row) for row in batch]
        except (UserError, TypeError) as error:
            return str(error)
        return None

    @staticmethod
    def _lines(file: Path) -> Iterator[list[dict[str, Any]]]:
        if not file.is_file():
            return
        whole, end, _ = file.read_bytes().rpartition(b"\n")
        for number, line in enumerate(whole.decode("utf-8", errors="replace").split("\n") if end else (), 1):
            place = f"{file}, line {number}"
            yield files.check(files.parse_json(line, place), list[dict[str, Any]], place)

    def add_batch(self, *batch: Any, **more: Any) -> None:
        """As in CompressionLog; a request whose answer was lost after its record was written counts once."""
        start = len(self.records)
        super().add_batch(*batch, **more)  # type: ignore[misc]
        new = [r for r in self.records[start:] if r.identity not in self.before]
        self.records[start:] = new
        if new:
            files.append_line(self.file, json.dumps([asdict(r) for r in new], default=_number))


def _number(value: Any) -> Any:
    return value.item()  # of numpy or torch


@contextmanager
def captured(file: Path) -> Iterator[None]:
    """What a run prints and logs goes into its own file; bars of eighty runs would drown the sweep's own."""
    root, theirs = logging.getLogger(), logging.getLogger("lm_eval")
    with file.open("a", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
        handler = logging.StreamHandler(out)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        before = [(logger, logger.level, logger.handlers[:], logger.propagate) for logger in (root, theirs)]
        root.handlers[:], theirs.handlers[:], theirs.propagate = [handler], [], True  # it may have been set up already
        root.setLevel(logging.INFO)
        theirs.setLevel(logging.INFO)
        try:
            yield
        finally:
            for logger, level, handlers, propagate in before:
                logger.handlers[:], logger.propagate = handlers, propagate
                logger.setLevel(level)


def _is_out_of_memory(error: BaseException) -> bool:
    """The accelerator's and the host's, also where another error was raised from it."""
    import torch

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _is_no_room(error: BaseException | None) -> bool:
    """Whether a write failed for want of room, also where another error was raised from that."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

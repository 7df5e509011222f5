"""One point of a sweep: a normal lm-eval run in a folder of its own, and a record of what became of it.

The run happens in this process, one after the other, so that torch and lm-eval are imported once; a point that raises
is recorded and the sweep goes on. What kills the process itself ends the sweep; it goes on at the same point when it
is started again. Under Ray the process is a worker, and its death is one point's failure.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import platform
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kv_lm_eval import __version__, plugin, reports
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics.compression import CompressionLog

DONE, FAILED, OUT_OF_MEMORY, RUNNING = "done", "failed", "out_of_memory", "running"
RECORD, LOG, ANSWERS, REQUESTS = "point.json", "log.txt", "answers", "requests.pickle"


def folder_of(point: dict[str, Any], output: Path) -> Path:
    """Where a point's files are: found by its hash, so that a new name in the configuration loses nothing."""
    for found in sorted((output / "points").glob(f"*-{point['hash'][:8]}")):
        if read_record(found).get("hash") == point["hash"]:
            return found
    return output / "points" / point["id"]


def read_record(folder: Path) -> dict[str, Any]:
    """A point's record, empty where it was never started."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_json(file: Path, what: Any) -> None:
    """Whole or not at all, whenever the process is killed."""
    beside = file.with_name(file.name + ".new")
    beside.write_text(json.dumps(what, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(beside, file)


def run_point(point: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs one point and returns its record, which is also in its folder.

    Args:
        point: as in plan.json.
        folder: the point's own; what an interrupted run left there is used or cleared away.
    """
    import kv_lm_eval.model  # noqa: F401  (here, so that its seconds are not the first point's)

    folder.mkdir(parents=True, exist_ok=True)
    resumed = any(folder.glob(f"{ANSWERS}_rank*.db"))
    clear_results(folder)
    record = {**point, "status": RUNNING, "error": None, "seconds": None, "resumed": resumed, "results_file": None}
    write_json(folder / RECORD, {**record, "versions": versions()})
    start = time.perf_counter()
    with _captured(folder / LOG):
        try:
            _evaluate(point, folder)
            record["status"] = DONE
        except (Exception, SystemExit) as error:
            record["status"] = OUT_OF_MEMORY if _is_out_of_memory(error) else FAILED
            record["error"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            traceback.print_exc()
    _free_memory()
    if record["status"] == DONE:
        record["seconds"] = round(time.perf_counter() - start, 2)
        results = sorted(reports.results_files(folder))
        record["results_file"] = str(results[-1].relative_to(folder))
    write_json(folder / RECORD, {**record, "versions": versions()})
    if record["status"] == DONE:
        for file in [*folder.glob(f"{ANSWERS}_rank*"), folder / REQUESTS]:
            file.unlink(missing_ok=True)
    return record


def clear_results(folder: Path) -> None:
    """A run that was killed while it wrote may have left some of its files: the next one writes all of them."""
    for file in [*folder.rglob("results_*.json"), *folder.rglob("samples_*.jsonl")]:
        file.unlink()


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    packages = ("lm_eval", "torch", "transformers")
    return {"kv-lm-eval": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}


def _evaluate(point: dict[str, Any], folder: Path) -> None:
    plugin.install()
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.loggers import EvaluationTracker

    seeds = point["seed"] if isinstance(point["seed"], list) else [point["seed"]] * 4
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    seeded = {} if point["seed"] is None else dict(zip(names, seeds, strict=True))
    sizes = {key: point[key] for key in ("batch_size", "max_batch_size", "device")}
    lm = get_model(point["model"]).create_from_arg_obj(dict(point["model_args"]), sizes)
    if hasattr(lm, "compression_log"):
        lm.compression_log = KeptLog(folder / REQUESTS)
    tracker = EvaluationTracker(output_path=str(folder))
    with task_manager(point) as manager:
        results = simple_evaluate(
            model=lm,
            model_args=point["model_args"],
            tasks=point["tasks"],
            task_manager=manager,
            use_cache=str(folder / ANSWERS),
            log_samples=True,
            evaluation_tracker=tracker,
            **{key: point[key] for key in ("num_fewshot", "limit", "gen_kwargs", "system_instruction")},
            **{key: point[key] for key in ("bootstrap_iters", "batch_size", "max_batch_size", "device")},
            **{key: bool(point[key]) for key in ("confirm_run_unsafe_code",)},
            apply_chat_template=point["apply_chat_template"] or False,
            fewshot_as_multiturn=point["fewshot_as_multiturn"] is not False,
            **seeded,
        )
    results["config"]["model"] = point["model"]  # lm-eval names a loaded model by its weights
    tracker.general_config_tracker.model_source = point["model"]
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    print(reports.write_all(reports.results_files(folder)))


@contextmanager
def task_manager(point: dict[str, Any]) -> Iterator[Any]:
    """lm-eval's index of tasks, only ours where that will do: it saves seconds a point."""
    plugin.install()
    from lm_eval.tasks import TaskManager

    metadata = {**point["model_args"], **(point["metadata"] or {})}
    small = point["include_path"] is None and plugin.owns_tasks(point["tasks"])
    with plugin.only_our_tasks() if small else nullcontext():
        yield TaskManager(include_path=point["include_path"], metadata=metadata)


class KeptLog(CompressionLog):
    """A compression log that survives a kill: requests answered before it are in the statistics after it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        with suppress(FileNotFoundError, EOFError, pickle.UnpicklingError), file.open("rb") as lines:
            while True:  # until the end, or what was being written
                self.records += pickle.load(lines)
        self.before = {r.identity for r in self.records}

    def add_batch(self, *batch: Any, **more: Any) -> None:
        """As in CompressionLog; a request whose answer was lost after its record was written counts once."""
        start = len(self.records)
        super().add_batch(*batch, **more)
        new = [r for r in self.records[start:] if r.identity not in self.before]
        self.records[start:] = new
        with self.file.open("ab") as out:
            pickle.dump(new, out)


@contextmanager
def _captured(file: Path) -> Iterator[None]:
    """What a run prints and logs goes into its own file; bars of eighty runs would drown the sweep's own."""
    root = logging.getLogger()
    with file.open("a", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
        handler = logging.StreamHandler(out)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        level, others = root.level, root.handlers[:]
        root.handlers[:] = [handler]
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            root.handlers[:] = others
            root.setLevel(level)


def _is_out_of_memory(error: BaseException) -> bool:
    """The accelerator's and the host's, also where another error was raised from it."""
    import torch

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Experiment trackers hear of the cache too: kv_stats as metrics, pictures beside the results as artefacts.

`--wandb_args`, `--trackio_args` and `--hf_hub_log_args` are lm-eval's own and log scores, samples and, within the
config, our numbers as one text. Here its loggers' methods are wrapped for runs of our model: metrics are logged with
the scores, under names that begin with kv/, and pictures before the run is finished, since they are drawn of its
results file. On the hub, where the results file holds the numbers already, the pictures go beside it.

For MLflow lm-eval has neither an option nor a logger. Where a run of MLflow is active, or its own MLFLOW_RUN_ID or
MLFLOW_EXPERIMENT_NAME asks for one, scores, numbers, settings, the results file and pictures are logged when lm-eval
saves its results.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kv_lm_eval import reports, saving

PREFIX = "kv/"
log = logging.getLogger("lm_eval.models.kvcompressed")


def install() -> None:
    """Wraps lm-eval's loggers, once; each does nothing for runs of other models."""
    from lm_eval import loggers

    _wrap(loggers.WandbLogger, "log_eval_result", after=_log_to_wandb)
    _complete(loggers.WandbLogger)
    if (trackio := getattr(loggers, "TrackioLogger", None)) is not None:  # from lm-eval 0.4.13 on
        _wrap(trackio, "log_eval_result", after=_log_to_trackio)
        _wrap(trackio, "finish", before=_pictures_to_trackio)
    _wrap(loggers.EvaluationTracker, "recreate_metadata_card", before=_push_pictures)
    _wrap(loggers.EvaluationTracker, "save_results_aggregated", after=_log_to_mlflow)


def metrics_of(results: dict[str, Any]) -> dict[str, float]:
    """Every number of a run's kv_stats by its path, as kv/kept_fraction_mean; empty for other models."""
    found: dict[str, float] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                walk(below, f"{path}/{key}")
        elif isinstance(value, (int, float)):
            found[path] = float(value)

    for key, value in ((results.get("config") or {}).get("kv_stats") or {}).items():
        walk(value, f"{PREFIX}{key}")
    return found


def pictures_of(written: list[Path]) -> list[Path]:
    """The pictures of a run's results files, drawn now if they are not there yet."""
    found = {file for file in written if file.suffix == ".json" and file.is_file()}
    reports.write_all(found)
    since = min((file.stat().st_mtime_ns for file in found), default=0)
    beside = {picture for file in found for picture in file.parent.glob("*.png")}
    return sorted(picture for picture in beside if picture.stat().st_mtime_ns >= since)


def _wrap(owner: Any, name: str, before: Any = None, after: Any = None) -> None:
    """Puts a function of ours around a method; what goes wrong in ours is said and costs neither scores nor results."""
    original, ours = getattr(owner, name), before or after
    known = getattr(original, "has_of_kv_lm_eval", ())
    if ours in known:
        return

    def safely(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            ours(self, *args, **kwargs)
        except Exception as error:
            log.warning("%s: kv_stats or pictures were not logged: %r", type(self).__name__, error)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            safely(self, *args, **kwargs)
        out = original(self, *args, **kwargs)
        if after is not None:
            safely(self, *args, **kwargs)
        return out

    method.has_of_kv_lm_eval = (*known, ours)  # type: ignore[attr-defined]
    setattr(owner, name, method)


# ---------------------------------------------------------------------------------------------------- wandb


def _complete(owner: Any) -> None:
    """lm-eval's table of samples wants every score of a task in every sample, and stops at the first that lacks one: of
    a request that ran out of memory, or of an answer without its needle, which counts for one score alone."""
    original = owner._generate_dataset
    if getattr(original, "has_of_kv_lm_eval", False):
        return

    @functools.wraps(original)
    def _generate_dataset(self: Any, data: Sequence[dict[str, Any]], config: dict[str, Any]) -> Any:
        return original(self, *(with_every_score(data, config) if metrics_of(self.results) else (data, config)))

    _generate_dataset.has_of_kv_lm_eval = True  # type: ignore[attr-defined]
    owner._generate_dataset = _generate_dataset


def with_every_score(
    samples: Sequence[dict[str, Any]], config: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Samples with NaN for a score that they lack, and a task's config without scores that no sample has, or that are
    no numbers (a needle's cell)."""
    examples: dict[str, Any] = {}
    for sample in reversed(samples):
        examples |= {m["metric"]: sample[m["metric"]] for m in config["metric_list"] if m["metric"] in sample}
    blanks = {
        name: type(one)([math.nan] * len(one)) if isinstance(one, (list, tuple)) else math.nan
        for name, one in examples.items()
        if not isinstance(one, dict)
    }
    listed = [m for m in config["metric_list"] if m["metric"] in blanks]
    return [{**blanks, **sample} for sample in samples], {**config, "metric_list": listed}


def _log_to_wandb(logger: Any) -> None:
    if metrics := metrics_of(logger.results):
        logger.run.log(metrics, step=logger.step)
        logger.run = _Finishing(logger.run, functools.partial(_pictures_to_wandb, step=logger.step))


class _Finishing:
    """A tracker's run that does something before its end."""

    def __init__(self, run: Any, last: Callable[[Any], None]) -> None:
        self._run, self._last = run, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def finish(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self._last(self._run)
        except Exception as error:
            log.warning("the pictures were not logged: %r", error)
        return self._run.finish(*args, **kwargs)


def _pictures_to_wandb(run: Any, step: int | None) -> None:
    """As images of the run, and as an artefact with the files."""
    import wandb

    if not (pictures := pictures_of(saving.written_last())):
        return
    run.log(_images(wandb, pictures), step=step)
    artefact = wandb.Artifact("kv_pictures", type="pictures")
    for file in pictures:
        artefact.add_file(str(file))
    run.log_artifact(artefact)


def _log_to_trackio(logger: Any) -> None:
    if metrics := metrics_of(logger.results):
        logger._trackio.log(metrics, step=logger.step)


def _pictures_to_trackio(logger: Any) -> None:
    if metrics_of(logger.results) and (pictures := pictures_of(saving.written_last())):
        logger._trackio.log(_images(logger._trackio, pictures), step=logger.step)


def _images(library: Any, pictures: list[Path]) -> dict[str, Any]:
    return {f"{PREFIX}pictures/{file.stem}": library.Image(str(file)) for file in pictures}


def _push_pictures(tracker: Any) -> None:
    if not tracker.api or not tracker.push_results_to_hub:
        return
    repo = tracker.results_repo if tracker.public_repo else tracker.results_repo_private
    for file in pictures_of(saving.written_last()):
        tracker.api.upload_file(
            repo_id=repo,
            repo_type="dataset",
            path_or_fileobj=str(file),
            path_in_repo=f"{tracker.general_config_tracker.model_name}/{file.name}",
            commit_message=f"Adding pictures for {tracker.general_config_tracker.model_name}",
        )


# ---------------------------------------------------------------------------------------------------- mlflow


def _log_to_mlflow(tracker: Any, results: dict[str, Any], samples: Any = None) -> None:
    """Into the active run, else the one that MLflow's own variables name, which is ended here."""
    asked = any(os.environ.get(name) for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"))
    if not (asked or "mlflow" in sys.modules) or not (metrics := metrics_of(results)):
        return
    import mlflow

    if mlflow.active_run() is None and not asked:
        return
    with nullcontext() if mlflow.active_run() is not None else mlflow.start_run():
        mlflow.log_params({f"{PREFIX}{k}": v for k, v in results["config"].get("kv_compression", {}).items()})
        mlflow.log_metrics({_plain(name): value for name, value in {**scores_of(results), **metrics}.items()})
        written = saving.written_last()
        for file in [*(file for file in written if file.suffix == ".json"), *pictures_of(written)]:
            mlflow.log_artifact(str(file), "kv_pictures" if file.suffix == ".png" else None)


def scores_of(results: dict[str, Any]) -> dict[str, float]:
    """Every score by task, name and filter, as kv_needle/contains; standard errors too."""
    found = {}
    for task, numbers in results["results"].items():
        for key, value in numbers.items():
            name, _, filter_ = key.partition(",")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found["/".join([task, name, *([filter_] if filter_ not in ("", "none") else [])])] = float(value)
    return found


def _plain(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)

"""The official LongBench numbers of an lm-eval run, beside its results file.

Beside `results_<date>.json` stand afterwards `longbench_<date>.json` and, where the run had --log_samples,
`longbench_<date>/pred/<dataset>.jsonl` (pred_e for LongBench-E), which the official eval.py scores too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files

from . import predictions
from .aggregate import AVERAGES, BUCKETS, averages
from .specs import CATEGORIES, official
from .v2 import report as v2


def write(results_file: Path) -> str:
    """Writes the official numbers of a results file beside it; returns the page to print, "" without LongBench."""
    results_file = Path(results_file)
    results = read(results_file)
    return "\n".join(said for said in (_first(results_file, results), v2.page(results)) if said)


def _first(results_file: Path, results: Mapping[str, Any]) -> str:
    found = summary(results)
    if not found:
        return ""
    date = results_file.stem.rsplit("_", 1)[-1]  # it has no underscore
    said = []
    folder = results_file.with_name(f"longbench_{date}")
    for samples in sorted(results_file.parent.glob(f"samples_*_{date}.jsonl")):
        run = found["tasks"].get(predictions.task_of_samples(samples))
        if run is not None:
            file = folder / ("pred_e" if run["longbench_e"] else "pred") / f"{run['dataset']}.jsonl"
            predictions.write(file, predictions.from_samples(samples))
            said = [f"Predictions in the official format: {folder}"]
    beside = results_file.with_name(f"longbench_{date}.json")
    files.write_json(beside, found)
    return "\n".join([page(found), *said, f"Written to {beside}"])


class Results(TypedDict):
    """What is read of an lm-eval results file."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    results: NotRequired[dict[str, dict[str, Any]]]
    configs: NotRequired[dict[str, dict[str, Any]]]


class Run(TypedDict):
    """What is read of a task's record of how it was run."""

    dataset: str
    longbench_e: bool
    protocol: str


def read(results_file: Path) -> dict[str, Any]:
    """lm-eval's results.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    return files.read_json(results_file, Results)


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """The official numbers in lm-eval's results; empty if no LongBench task is among them."""
    tasks, scores, scores_e = {}, {}, {}
    for task, config in results.get("configs", {}).items():
        run = config["metadata"].get("longbench") if isinstance(config.get("metadata"), dict) else None
        values = results.get("results", {}).get(task, {})
        if not isinstance(run, dict) or "score,none" not in values:
            continue
        files.check(run, Run, f"configs.{task}.metadata.longbench")
        counts = results.get("n-samples", {}).get(task, {})
        tasks[task] = {
            **run,
            "score": values["score,none"],
            "samples": counts.get("effective"),
            "samples_of": counts.get("original"),
            "truncated_share": values.get("truncated,none"),
        }
        if run["longbench_e"]:
            buckets = {bucket: values.get(f"score_{bucket},none") for bucket in BUCKETS}
            scores_e[run["dataset"]] = {b: v for b, v in buckets.items() if isinstance(v, (int, float)) and v == v}
        else:
            scores[run["dataset"]] = values["score,none"]
    return collect(scores, scores_e, tasks) if tasks else {}


def collect(
    scores: Mapping[str, float], scores_e: Mapping[str, Mapping[str, float]], tasks: Mapping[str, Any]
) -> dict[str, Any]:
    """Datasets and averages in one record."""
    return {
        "protocols": sorted({run["protocol"] for run in tasks.values()}),
        "datasets": _ordered(scores),
        "averages": averages(scores, official()) if scores else {},
        "datasets_e": _ordered(scores_e),
        "tasks": dict(tasks),
    }


def _ordered(scores: Mapping[str, Any]) -> dict[str, Any]:
    """By category and language as on the leaderboard; unknown datasets last."""
    categories = list(CATEGORIES)
    place = {name: (categories.index(spec.category), spec.language == "zh") for name, spec in official().items()}
    return dict(sorted(scores.items(), key=lambda item: (place.get(item[0], (len(categories), True)), item[0])))


def page(found: Mapping[str, Any]) -> str:
    """What is printed: datasets, category means, averages, and what stands in the way of comparing them."""
    lines = ["", "LongBench, official scores" + _protocol_words(found)] if found["datasets"] else [""]
    lines += [f"  {name:<22}{score:7.2f}" for name, score in found["datasets"].items()]
    means = found["averages"]
    for language in ("en", "zh") if means else ():
        for category, mean in means[language]["categories"].items():
            lines.append(f"  {CATEGORIES[category] + ' (' + language + ')':<30}{mean:7.2f}   mean of its datasets")
        if "average" in means[language]:
            lines.append(f"  {language.upper():<30}{means[language]['average']:7.2f}   {AVERAGES[language]}")
    if "mean16" in means:
        lines.append(f"  {'Mean of 16':<30}{means['mean16']:7.2f}   {AVERAGES['mean16']}")
    for name, lacking in means.get("missing", {}).items():
        lines.append(f"  no {name}: {len(lacking)} of its datasets have not been run")
    if found["datasets_e"]:
        lines.append("LongBench-E, official scores by length" + _protocol_words(found))
        lines.append(" " * 24 + "".join(f"{bucket:>9}" for bucket in BUCKETS))
        for name, buckets in found["datasets_e"].items():
            cells = (f"{buckets[b]:9.2f}" if b in buckets else f"{'':>9}" for b in BUCKETS)
            lines.append(f"  {name:<22}" + "".join(cells).rstrip())
    cut = [t for t, run in found["tasks"].items() if run.get("samples_of") and run["samples"] != run["samples_of"]]
    if cut:
        lines.append(f"  Not all samples were run ({len(cut)} tasks): not to be compared with published numbers.")
    return "\n".join(lines)


def _protocol_words(found: Mapping[str, Any]) -> str:
    lengths = sorted({str(run.get("max_length")) for run in found["tasks"].values()} - {"None"})
    words = [f"protocol {', '.join(found['protocols'])}"] if found["protocols"] else []
    words += [f"prompts cut to {', '.join(lengths)} tokens"] if lengths else []
    return f" ({'; '.join(words)})" if words else ""

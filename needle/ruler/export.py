"""A run's results in the form of NVIDIA/kvpress's evaluation: config.yaml, metrics.json and predictions.csv a length.

Reference: NVIDIA/kvpress, evaluation/evaluate.py (names of folders and fields).
Deviations: columns of predictions.csv have one order (there: that of a set); press_init_command says our settings.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict
from typing_extensions import TypedDict

from kv_lm_eval import files, presets
from kv_lm_eval.errors import UserError

from . import protocol
from .split import TASKS

COLUMNS = (
    *("question", "answer_prefix", "answer", "task", "max_new_tokens"),
    *("predicted_answer", "compression_ratio"),
)


class Document(TypedDict):
    """What is read of a sample's document."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    question: str
    answer_prefix: str
    answer: list[str]
    task: str
    max_new_tokens: int
    length: int


class Sample(TypedDict):
    """What is read of a sample."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    doc_id: int
    doc: Document
    resps: list[list[str]]


def date(results_file: Path) -> str:
    """The date in the names of a run's files."""
    return results_file.stem.rsplit("_", 1)[-1]


def samples_of(results_file: Path) -> list[Path]:
    """RULER's samples files of a run."""
    return sorted(results_file.parent.glob(f"samples_kv_ruler_*_{date(results_file)}.jsonl"))


def write(results_file: Path, folder: Path) -> list[Path]:
    """Writes a folder of kvpress's files for each length of a run below `folder`.

    Raises:
        UserError: the run was not protocol=kvpress, had no --log_samples, or no share as its budget.
    """
    results = files.read_json(results_file, dict[str, Any])
    metadata = {t: c.get("metadata") or {} for t, c in results.get("configs", {}).items() if "kv_ruler_" in t}
    runs = [m["ruler"] for m in metadata.values() if "ruler" in m]
    if not runs or any(run["protocol"] != "kvpress" for run in runs):
        raise UserError(f"{results_file}: no RULER run of protocol=kvpress, which alone is kvpress's")
    found = samples_of(results_file)
    if not found:
        raise UserError(f"{results_file}: its answers are not beside it; run with --log_samples")
    samples = [sample for file in found for _, sample in files.read_jsonl(file, Sample)]
    given = next(iter(metadata.values()))
    row, ratio = _row(results, given), _ratio(results)
    written = []
    for length in sorted({sample["doc"]["length"] for sample in samples}):
        mine = [sample for sample in samples if sample["doc"]["length"] == length]
        config = _config(results, given, row, ratio, length, len(mine))
        name = "__".join(["ruler", str(length), config["model"].replace("/", "--"), row, f"{ratio:.2f}"])
        name += f"__fraction{config['fraction']:.3f}" * (config["fraction"] < 1)
        name += "__compressed_questions" * config["compress_questions"]
        files.write_whole(folder / name / "predictions.csv", _table(mine, ratio))
        files.write_json(folder / name / "metrics.json", _metrics(mine), indent=4)
        files.write_whole(folder / name / "config.yaml", yaml.safe_dump(config, sort_keys=False, indent=2))
        written.append(folder / name)
    return written


def _row(results: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The leaderboard's name of a method: the preset's, else the method's own."""
    if (name := presets.named(given)) and "row" in (preset := presets.load(name)):
        return preset["row"]
    method = str((results["config"].get("kv_compression") or {}).get("method", "full"))
    return "no_press" if method == "full" else method


def _ratio(results: Mapping[str, Any]) -> float:
    """The share of pairs removed."""
    settings = results["config"].get("kv_compression") or {"method": "full"}
    if settings["method"] == "full":
        return 0.0
    if not isinstance(settings.get("keep_ratio"), (int, float)):
        raise UserError("the run's budget is a number of slots, and kvpress's rows have a share: use compression_ratio")
    return round(1 - settings["keep_ratio"], 12)


def _config(
    results: Mapping[str, Any], given: Mapping[str, Any], row: str, ratio: float, length: int, samples: int
) -> dict[str, Any]:
    """kvpress's EvaluationConfig, all of its fields."""
    settings = results["config"].get("kv_compression") or {"method": "full"}
    whole = sum(c.get("original", 0) for t, c in results.get("n-samples", {}).items() if "kv_ruler_" in t)
    lengths = len(given["ruler"]["lengths"])
    return {
        "dataset": "ruler",
        "data_dir": str(length),
        "model": str(given.get("pretrained", results.get("model_name", ""))),
        "device": None,
        "press_name": row,
        "compression_ratio": ratio,
        "key_channel_compression_ratio": None,
        "fraction": round(min(1.0, samples * lengths / whole), 6) if whole else 1.0,
        "max_new_tokens": None,
        "max_context_length": None,
        "compress_questions": bool(given["ruler"]["compress_questions"]),
        "needle_depth": None,
        "compression_interval": None,
        "target_size": None,
        "hidden_states_buffer_size": None,
        "output_dir": "./results",
        "log_level": "INFO",
        "model_kwargs": {},
        "press_init_command": "kv-lm-eval " + ",".join(f"{k}={v}" for k, v in sorted(settings.items())),
        "seed": 42,
    }


def _table(samples: list[Sample], ratio: float) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for sample in samples:
        row = {**sample["doc"], "predicted_answer": sample["resps"][0][0], "compression_ratio": ratio}
        writer.writerow([row[column] for column in COLUMNS])
    return out.getvalue()


def _metrics(samples: list[Sample]) -> dict[str, dict[str, float]]:
    found = {}
    for task in sorted({sample["doc"]["task"] for sample in samples} & set(TASKS)):
        scores = [
            protocol.score(task, sample["resps"][0][0], sample["doc"]["answer"])
            for sample in samples
            if sample["doc"]["task"] == task
        ]
        found[task] = {"string_match": round(sum(scores) / len(scores) * 100, 2)}
    return found

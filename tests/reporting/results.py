"""Folders of results as lm-eval writes them, made by hand: no model is run."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

FULL = {"method": "full"}


def snapkv(budget: int = 64, **more: Any) -> dict[str, Any]:
    """Settings after defaults, as config.kv_compression has them."""
    return {"method": "snapkv", "max_capacity_prompt": budget, "window_size": 16, "compress_every": 0, **more}


def mean_task(scores: list[float], metric: str = "acc", filter_: str = "none", **more: Any) -> dict[str, Any]:
    """A task whose number is the mean of its documents'."""
    return {"metric": metric, "filter": filter_, "values": scores, "value": math.fsum(scores) / len(scores), **more}


def perplexity_task(pairs: list[tuple[float, int]]) -> dict[str, Any]:
    """A task with weighted perplexity: documents are (log-likelihood, words)."""
    value = math.exp(-sum(p[0] for p in pairs) / sum(p[1] for p in pairs))
    return {"metric": "word_perplexity", "filter": "none", "values": pairs, "value": value, "better": False}


def run(
    folder: Path,
    compression: dict[str, Any] | None,
    tasks: dict[str, dict[str, Any]],
    *,
    date: int = 1,
    groups: dict[str, dict[str, Any]] | None = None,
    stats: dict[str, Any] | None = None,
    log_samples: bool = True,
    metadata: dict[str, Any] | None = None,
    top: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """One results file and its samples files.

    Args:
        tasks: by name, as mean_task; `docs` numbers the documents (default 0, 1, ...), `answers` and `extra` go into
            the samples.
        groups: by name: {"tasks": [...], "metric": ..., "value": ...}.
        metadata: --metadata; top: more keys of the file itself, config: of its `config`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = f"2026-01-01T00-00-{date:02d}.000000"
    results: dict[str, Any] = {}
    kept = 1.0 if compression in (None, FULL) else 0.25
    share = 0.0 if compression in (None, FULL) else 1.0
    by_task = {}
    hashes = {}
    requests = sum(len(t["values"]) for t in tasks.values())
    for task, t in tasks.items():
        stderr = "N/A" if t.get("better") is False else 0.01
        results[task] = {
            "alias": task,
            f"{t['metric']},{t['filter']}": t["value"],
            f"{t['metric']}_stderr,{t['filter']}": stderr,
        }
        times = {"efficiency": stats["efficiency"]} if "efficiency" in (stats or {}) else {}
        by_task[task] = {**_stats(len(t["values"]), kept), **times, "compressed_share": t.get("compressed", share)}
        if log_samples:
            hashes[task] = _samples(folder / f"samples_{task}_{stamp}.jsonl", t)
    for group, g in (groups or {}).items():
        results[group] = {"alias": group, f"{g['metric']},none": g["value"]}
    whole = {
        "results": results,
        "group_subtasks": {name: g["tasks"] for name, g in (groups or {}).items()},
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {
            **{name: {t["metric"]: t.get("better", True)} for name, t in tasks.items()},
            **{name: {g["metric"]: True} for name, g in (groups or {}).items()},
        },
        "n-samples": {name: {"effective": len(t["values"])} for name, t in tasks.items()},
        "task_hashes": hashes,
        "configs": {name: {"metadata": {"version": 1.0, **(metadata or {})}} for name in tasks},
        "config": {
            "model": "hf" if compression is None else "kvcompressed",
            "model_args": {"pretrained": "models/toy", "method": (compression or {}).get("method")},
            "model_dtype": "torch.float32",
            **(
                {
                    "kv_compression": compression,
                    "kv_stats": {**_stats(requests, kept), "by_task": by_task, **(stats or {})},
                }
                if compression
                else {}
            ),
            **config,
        },
        "date": date,
        "lm_eval_version": "0.4.13",
        "model_name": "models/toy",
        "total_evaluation_time_seconds": "12.5",
        "chat_template": None,
        "system_instruction": None,
        "fewshot_as_multiturn": False,
        **(top or {}),
    }
    file = folder / f"results_{stamp}.json"
    file.write_text(json.dumps(whole), encoding="utf-8")
    return file


def _stats(requests: int, kept: float) -> dict[str, Any]:
    return {
        "requests": requests,
        "compressed_share": float(kept < 1),
        "kept_fraction_mean": kept,
        "kv_bytes_prefill_mean": 1024.0 * 100 * kept,
        "kv_bytes_decode_mean": 1024.0 * 110 * kept,
        "kv_bytes_allocated_mean": 1024.0 * 120 * kept,
        "overhead_bytes_mean": 64.0,
    }


def efficiency(**measured: dict[str, Any]) -> dict[str, Any]:
    """kv_stats.efficiency: spreads of what was measured, nothing of the rest."""
    nothing = {"median": None, "p10": None, "p90": None, "n": 0}
    names = ("ttft_s", "tpot_s", "tokens_per_s", "prefill_peak_bytes", "decode_peak_bytes")
    return {"requests": 9, **dict.fromkeys(names, nothing), **measured}


def _samples(file: Path, t: dict[str, Any]) -> str:
    """Writes the answers and returns lm-eval's hash over them."""
    numbers = t.get("docs", range(len(t["values"])))
    answers = t.get("answers", [f"answer {v}" for v in t["values"]])
    lines, hashes = [], ""
    for n, value, answer in zip(numbers, t["values"], answers, strict=True):
        doc = {"question": f"question {n}", **t.get("extra", [{}] * 999)[n]}
        hashed = {k: v for k, v in doc.items() if k != "per_token"}  # which is added while a text is scored
        record = {
            "doc_id": n,
            "doc": doc,
            "target": f"target {n}",
            "arguments": {"gen_args_0": {"arg_0": t.get("prompt", "prompt {}").format(n), "arg_1": {"until": []}}},
            "resps": [[answer]],
            "filtered_resps": [answer],
            "filter": t["filter"],
            "metrics": [] if value is None else [t["metric"]],  # none of a request that ran out of memory
            "doc_hash": hashlib.sha256(json.dumps(hashed, indent=2, ensure_ascii=False).encode()).hexdigest(),
            "prompt_hash": hashlib.sha256(t.get("prompt", "prompt {}").format(n).encode(errors="replace")).hexdigest(),
            t["metric"]: value,
        }
        record["target_hash"] = hashlib.sha256(record["target"].encode()).hexdigest()
        if value is None:
            del record[t["metric"]]
        hashes += record["doc_hash"] + record["prompt_hash"] + record["target_hash"]
        lines.append(json.dumps(record))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return hashlib.sha256(hashes.encode()).hexdigest()


def planned(id_: str, name: str, settings: dict[str, Any], tasks: list[str], **more: Any) -> dict[str, Any]:
    """A point as a sweep's plan has it."""
    return {
        "id": id_,
        "name": name,
        "hash": "0" * 64,
        "model": "kvcompressed",
        "method": settings.get("method", "snapkv"),
        "settings": {k: v for k, v in settings.items() if k != "method"},
        "model_args": {"pretrained": "models/toy", "method": settings.get("method")},
        "tasks": tasks,
        **more,
    }


def plan(folder: Path, points: list[dict[str, Any]], name: str = "sweep") -> None:
    """A sweep's plan."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps({"name": name, "points": points}), encoding="utf-8")


def point(
    folder: Path,
    name: str,
    status: str,
    settings: dict[str, Any],
    tasks: list[str],
    results_file: str | None,
    **more: Any,
) -> dict[str, Any]:
    """A sweep's record of one point; returns what its plan has."""
    folder.mkdir(parents=True, exist_ok=True)
    what = planned(folder.name, name, settings, tasks, **more)
    error = "OutOfMemoryError: too much" if status in ("failed", "out_of_memory") else None
    record = {**what, "status": status, "error": error, "results_file": results_file}
    (folder / "point.json").write_text(json.dumps(record), encoding="utf-8")
    return what

"""What is recorded of a run's configuration, beside model, method and settings: what tells two runs of a task apart.

A rule in place of a list: every argument of the model counts, and every setting of lm-eval's, but for the few that
decide where and how fast something is computed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from kv_lm_eval.reporting.rerun import metadata
from kv_lm_eval.reporting.run import Run, digest

BUDGETS = ("max_capacity_prompt", "cache_size", "keep_ratio", "compression_ratio", "threshold")
# Arguments of the model that name it, or that decide no answer; a preset's are in the settings and the task's record.
NO_CONDITION = frozenset(
    "pretrained method compression preset device device_map parallelize max_memory_per_gpu max_cpu_memory max_memory "
    "batch_size max_batch_size cache_dir local_files_only low_cpu_mem_usage force_download token use_safetensors "
    "offload_folder offload_buffers offload_state_dict".split()
)


def of_run(run: Run) -> dict[str, Any]:
    """Conditions of a whole run that are given; those of a method are in its settings."""
    config, point = run.config, run.point
    found = {k: v for k, v in run.model_args.items() if k not in NO_CONDITION and k not in run.settings}
    if config.get("kv_compression") and set(found) - {"dtype"}:
        found = {k: v for k, v in found.items() if k not in _other_names()}
    if dtype := config.get("model_dtype"):
        found["dtype"] = str(dtype).removeprefix("torch.")
    seeds = [config.get(name) for name in ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")]
    template = run.results.get("chat_template", point.get("apply_chat_template"))
    found |= {
        "model_sha": config.get("model_sha"),
        "chat_template": template,
        "fewshot_as_multiturn": run.results.get("fewshot_as_multiturn") if template else None,
        "system_instruction": run.results.get("system_instruction") or point.get("system_instruction"),
        "gen_kwargs": config.get("gen_kwargs") or point.get("gen_kwargs"),
        "limit": config.get("limit", point.get("limit")),
        "seed": seeds if any(seed is not None for seed in seeds) else point.get("seed"),
    }
    return {k: v for k, v in found.items() if v not in (None, "", {}, False)}


@functools.cache
def _other_names() -> frozenset[str]:
    """What a method's settings may be called by in --model_args; the results file has them under their own names."""
    from kv_lm_eval import config

    return frozenset({*config.ALIASES, *config.COMMON_KEYS})


def of_task(run: Run, task: str) -> dict[str, Any]:
    """Conditions of one task in a run."""
    results = run.results
    found = {
        "num_fewshot": (results.get("n-shot") or {}).get(task),
        "task_version": (results.get("versions") or {}).get(task),
        **metadata(run, task),
    }
    return {k: v for k, v in found.items() if v is not None}


def documents(run: Run, task: str) -> Any:
    """Which documents and prompts a task was asked: lm-eval's hash over them, else their number."""
    return (run.results.get("task_hashes") or {}).get(task) or run.documents(task)


def rest(run: Run) -> dict[str, Any]:
    """What is recorded besides: used for a label where nothing else tells two rows apart."""
    config = run.config
    tasks = sorted(run.tasks)
    return {
        **{name: run.model_args.get(name) for name in NO_CONDITION},
        **{name: config.get(name) for name in ("device", "batch_size")},
        **(config.get("kv_versions") or run.point.get("versions") or {}),
        "lm-eval": run.results.get("lm_eval_version"),
        "transformers": run.results.get("transformers_version"),
        "documents": [run.documents(task) for task in tasks],
        "asked": [documents(run, task) for task in tasks],
        "tasks": tasks,
        "file": str(run.results_file or run.point.get("id")),
    }


def contested(runs: Iterable[Run]) -> set[str]:
    """Conditions of whole runs in which one task was run in two ways: these make rows.

    A condition that goes with the task alone (a chat template for one task, for every method) makes none.
    """
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    runs = list(runs)
    scored = [run for run in runs if run.state == "scored"]
    names = sorted({name for run in scored for name in of_run(run)})
    found = set()
    for run in scored:
        mine = of_run(run)
        for task in run.tasks:
            for name in names:
                value = digest(mine.get(name))
                if seen.setdefault((run.model, task), {}).setdefault(name, value) != value:
                    found.add(name)
    return found


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names with two values, budgets first; what only some list (an unfinished point lists few) does not differ."""
    names = list(dict.fromkeys(name for s in settings for name in s))
    names.sort(key=lambda name: BUDGETS.index(name) if name in BUDGETS else len(BUDGETS))
    return [name for name in names if len({repr(s[name]) for s in settings if name in s}) > 1]


def shown(value: Any) -> str:
    """A value within a label; of a long one its ends, and a few letters that no other value shares."""
    if isinstance(value, float):
        return f"{value:g}"
    text = " ".join((value if isinstance(value, str) else digest(value)).split())
    if len(text) <= 24:
        return text
    return f"{text[:9]}…{text[-9:]}~{letters(value)}"


def letters(value: Any) -> str:
    """A few letters that tell a long value from another."""
    return hashlib.sha256(digest(value).encode(errors="replace")).hexdigest()[:4]

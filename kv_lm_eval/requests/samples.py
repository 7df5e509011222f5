"""What `--log_samples` writes of each sample's requests beside lm-eval's own fields: sizes and times, `efficiency`.

lm-eval has no field for what a model knows of a request: a sample holds the document, the arguments, the answers and
the metrics, and a change of any of them would change its hashes. So the one method that writes the samples files is
wrapped, and adds the field just before they are written.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from lm_eval.loggers import EvaluationTracker

from kv_lm_eval.metrics.compression import digest

_of_last_run: dict[tuple[str, str], dict[str, Any]] = {}


def remember(requests: Mapping[tuple[str, str], dict[str, Any]]) -> None:
    """Keeps the numbers of a run, by task and digest of the prompt, for when its samples are written."""
    _of_last_run.clear()
    _of_last_run.update(requests)
    original = EvaluationTracker.save_results_samples
    if hasattr(original, "wrapped_by_kv_lm_eval"):
        return

    @functools.wraps(original)
    def save(self: Any, task_name: str, samples: Any) -> None:
        source = self.general_config_tracker.model_source
        if not isinstance(source, str) or source == "kvcompressed":  # else these are the samples of another run
            for sample in samples:
                sample["efficiency"] = efficiency(task_name, sample["arguments"])
        original(self, task_name, samples)

    save.wrapped_by_kv_lm_eval = True  # type: ignore[attr-defined]
    EvaluationTracker.save_results_samples = save


def efficiency(task: str, arguments: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """One entry a distinct prompt of the sample; one that lm-eval's --use_cache answered says so and has no numbers."""
    found: dict[str, dict[str, Any]] = {}
    for args in arguments:
        for key in (digest(args[0]), digest(json.dumps(args, sort_keys=True, default=str))):
            if (task, key) in _of_last_run:
                found[key] = _of_last_run[task, key]
                break
        else:
            found.setdefault(digest(args[0]), {"from_request_cache": True})
    return list(found.values())

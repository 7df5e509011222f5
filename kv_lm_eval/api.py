"""`evaluate`: lm_eval.simple_evaluate with our plug-in, as short as the command line.

from kv_lm_eval import evaluate

results = evaluate("kv-tiny", method="snapkv", max_capacity_prompt=128, tasks=["kv_quickstart_needle"])
results["results"]["kv_quickstart_needle"]["exact_match,first_number"]
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kv_lm_eval import harness, plugin
from kv_lm_eval.errors import UserError


def evaluate(
    pretrained: str,
    *,
    tasks: str | Sequence[str],
    method: str = "full",
    output_path: str | Path | None = None,
    log_samples: bool = True,
    include_path: str | Path | None = None,
    metadata: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Evaluate a model under a method of compression; returns lm-eval's own results dictionary.

    Args:
        pretrained: a model's name on the Hub, its folder, or "kv-tiny", the embedded one.
        tasks: names, as of `--tasks`: a list, or one text with commas.
        method: as `kv-lm-eval methods` lists them.
        output_path: a folder for results_*.json and, with log_samples, samples_*.jsonl, as `--output_path`.
        log_samples: whether results["samples"] has every answer.
        include_path: a folder with task files of your own.
        metadata: as `--metadata`: what tasks are built with beside the model's arguments.
        **arguments: those of `lm_eval.simple_evaluate` (limit, num_fewshot, batch_size, device, gen_kwargs, ...); any
            other is one of `--model_args`: a setting of the method (max_capacity_prompt=128) or of the model
            (dtype="float32").

    Raises:
        UserError: a method, a setting or a value that does not exist; a folder that cannot be written, before weights
            are loaded; or results that could not be written to it, and where they are instead.
    """
    plugin.install()
    import lm_eval

    theirs = inspect.signature(lm_eval.simple_evaluate).parameters
    if taken := sorted({"model", "model_args", "task_manager", "evaluation_tracker"} & set(arguments)):
        raise UserError(
            f"{taken[0]}={arguments[taken[0]]!r}: evaluate() sets lm-eval's {taken[0]} itself. Give the model as its "
            'first argument and settings by name: evaluate("kv-tiny", method="snapkv", tasks=[...])'
        )
    model_args = {name: arguments.pop(name) for name in list(arguments) if name not in theirs}
    model_args = {"pretrained": pretrained, "method": method, **model_args}
    run = harness.run(
        plugin.MODEL_NAME,
        model_args,
        tasks.split(",") if isinstance(tasks, str) else list(tasks),
        output_path=output_path,
        include_path=include_path,
        metadata=metadata,
        log_samples=log_samples,
        **arguments,
    )
    return {} if run is None else run.results  # of every process but the first of several

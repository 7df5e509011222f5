"""`evaluate`: lm_eval.simple_evaluate with our plug-in, as short as the command line.

from kv_lm_eval import evaluate

results = evaluate("kv-tiny", method="snapkv", max_capacity_prompt=128, tasks=["kv_quickstart_needle"])
results["results"]["kv_quickstart_needle"]["exact_match,first_number"]

full, half = evaluate("kv-tiny", methods=["full", {"method": "snapkv", "keep_ratio": 0.5}], tasks=["kv_quickstart"])
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

from kv_lm_eval import harness, plugin
from kv_lm_eval.errors import UserError

Results = dict[str, Any]
SIZES = ("batch_size", "max_batch_size", "device")  # simple_evaluate's, for the model's constructor


@overload
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
) -> Results: ...
@overload
def evaluate(
    pretrained: str,
    *,
    tasks: str | Sequence[str],
    methods: Sequence[str | Mapping[str, Any]],
    output_path: str | Path | None = None,
    log_samples: bool = True,
    include_path: str | Path | None = None,
    metadata: dict[str, Any] | None = None,
    **arguments: Any,
) -> list[Results]: ...
def evaluate(
    pretrained: str,
    *,
    tasks: str | Sequence[str],
    method: str | None = None,
    methods: Sequence[str | Mapping[str, Any]] | None = None,
    output_path: str | Path | None = None,
    log_samples: bool = True,
    include_path: str | Path | None = None,
    metadata: dict[str, Any] | None = None,
    **arguments: Any,
) -> Results | list[Results]:
    """Evaluate a model under a method of compression, or under several that read each prompt once.

    Returns:
        lm-eval's own results dictionary; with `methods`, a list of them. Results of several methods say nothing of
        times, which none has of its own.

    Args:
        pretrained: a model's name on the Hub, its folder, or "kv-tiny", the embedded one.
        tasks: names, as of `--tasks`: a list, or one text with commas.
        method: as `kv-lm-eval methods` lists them; full where neither is given.
        methods: names, or mappings of a method with its settings: {"method": "snapkv", "keep_ratio": 0.5}.
        output_path: a folder for results_*.json and, with log_samples, samples_*.jsonl, as `--output_path`; of several
            methods each has its own in it, 1_NAME, 2_NAME and so on.
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
    if method is not None and methods is not None:
        raise UserError(
            f"method={method!r} and methods: give one of them; a name in `methods` is a method like any other"
        )
    model_args = {name: arguments.pop(name) for name in list(arguments) if name not in theirs}
    words = {
        "include_path": include_path,
        "metadata": metadata,
        "log_samples": log_samples,
        "tasks": tasks.split(",") if isinstance(tasks, str) else list(tasks),
        **arguments,
    }
    if methods is not None:
        asked = [{"method": one} if isinstance(one, str) else dict(one) for one in methods]
        return _each([{"pretrained": pretrained, **model_args, **one} for one in asked], output_path, words)
    model_args = {"pretrained": pretrained, "method": method or "full", **model_args}
    return _results(harness.run(plugin.MODEL_NAME, model_args, output_path=output_path, **words))


def _each(model_args: Sequence[dict[str, Any]], output_path: str | Path | None, words: dict[str, Any]) -> list[Results]:
    """Runs of one loaded model, of which the first answers for the others on the way.

    Args:
        words: of `harness.run` for all of them.
    """
    if not model_args:
        raise UserError("methods=[] asks for nothing: give names, or mappings of a method with its settings")
    sizes = {name: words[name] for name in SIZES if words.get(name) is not None}
    names = [Path(str(one.get("method") or one.get("preset") or "full")).stem for one in model_args]
    folders = [None if output_path is None else Path(output_path) / f"{i}_{n}" for i, n in enumerate(names, 1)]
    harness.check_limit(words.get("limit"))
    from kv_lm_eval.metrics.compression import CompressionLog
    from kv_lm_eval.model import KVCompressedLM
    from kv_lm_eval.sharing import answered_by, under

    first, *rest = model_args
    with harness.task_manager(words["tasks"], words["include_path"], words["metadata"]) as manager:
        harness.check_tasks(words["tasks"], manager)
    lm = KVCompressedLM(**first, **sizes)
    others, apart = list[Any](), set[int]()
    for i, one in enumerate(rest):
        try:
            others.append(under(lm, **one, **sizes))
        except UserError:
            raise
        except ValueError:  # loaded otherwise: for itself, then
            others.append(KVCompressedLM(**one, **sizes))
            apart.add(i)
    with tempfile.TemporaryDirectory() as kept:
        answers = [words.get("use_cache") or f"{kept}/{i}" for i in range(len(model_args))]

        def run(i: int, one: Any) -> Results:
            own = {**words, "use_cache": words.get("use_cache") if i == 0 else answers[i]}
            named = harness.run(one, model_args[i], output_path=folders[i], model_name=plugin.MODEL_NAME, **own)
            return _results(named)

        with ExitStack() as ready:
            for i, (other, file) in enumerate(zip(others, answers[1:], strict=True)):
                if i not in apart:
                    ready.enter_context(answered_by(lm, other, str(file), CompressionLog()))
            results = [run(0, lm)]
        return results + [run(i, other) for i, other in enumerate(others, 1)]


def _results(run: harness.Run | None) -> Results:
    return {} if run is None else run.results  # of every process but the first of several

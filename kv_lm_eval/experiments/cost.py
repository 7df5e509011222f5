"""What a sweep will cost: prompts and tokens by building its tasks, seconds from the points that are already done."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from statistics import median
from typing import Any

from kv_lm_eval import harness, tiny
from kv_lm_eval.experiments.run_point import DONE

Counted = tuple[int | None, int | None]  # prompts, tokens


def count(plan: list[dict[str, Any]], say: Callable[[str], None]) -> list[Counted]:
    """Prompts and tokens of every point; None where they cannot be known without a download.

    Points that ask the same questions of the same tokenizer are counted once.
    """
    known: dict[str, Counted] = {}
    out = []
    for point in plan:
        keys = ("tasks", "metadata", "limit", "num_fewshot", "apply_chat_template", "system_instruction")
        pretrained = str(point["model_args"].get("pretrained"))
        key = json.dumps([pretrained, *(point[k] for k in keys)], sort_keys=True, default=str)
        if key not in known:
            try:
                known[key] = _count(point, pretrained)
            except Exception as error:  # no network, no data set: a plan can be shown without its cost
                known[key] = (None, None)
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                say(f"not counted: {point['label']} with {pretrained}: {reason}")
        out.append(known[key])
    return out


def _count(point: dict[str, Any], pretrained: str) -> Counted:
    """Builds the tasks' requests as lm-eval does; texts that share a context are one prefill, so they count once."""
    metadata = {**point["model_args"], **(point["metadata"] or {})}
    with harness.task_manager(point["tasks"], point["include_path"], metadata) as manager:
        loaded = manager.load(point["tasks"])["tasks"]
    texts: dict[str, int | None] = {}  # each with the most tokens that are read of it
    for task in loaded.values():
        if point["num_fewshot"] is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=point["num_fewshot"])
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=_limit(task, point["limit"]), rank=0, world_size=1)
        for request in task.instances:
            options = request.args[1] if len(request.args) > 1 and isinstance(request.args[1], dict) else {}
            texts[str(request.args[0])] = options.get("max_eval_tokens")
    return len(texts), _tokens(texts, pretrained)


def _limit(task: Any, limit: float | None) -> int | None:
    """lm-eval's --limit: below one it is a share of the documents."""
    if limit is None:
        return None
    return ceil(len(task.eval_docs) * limit) if limit < 1 else int(limit)


def _tokens(texts: dict[str, int | None], pretrained: str) -> int | None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tiny.resolve(pretrained), local_files_only=True)
    except (OSError, ValueError):  # not downloaded yet
        return None
    lengths = (len(tokenizer(text, verbose=False)["input_ids"]) for text in texts)
    return sum(min(n, most or n) for n, most in zip(lengths, texts.values(), strict=True))


def seconds(plan: list[dict[str, Any]], counted: list[Counted], records: list[dict[str, Any]]) -> list[float | None]:
    """Expected seconds of every point: measured where it is done, otherwise by the tokens of the done ones.

    The rate is the median over the finished points of the same weights; without one of them, or without a count of
    tokens, there is nothing honest to say and the entry is None.
    """
    rates: dict[str, list[float]] = {}
    for point, (_, tokens), record in zip(plan, counted, records, strict=True):
        if record.get("status") == DONE and tokens and not record.get("resumed"):
            rates.setdefault(_weights(point), []).append(record["seconds"] / tokens)
    out: list[float | None] = []
    for point, (_, tokens), record in zip(plan, counted, records, strict=True):
        rate = rates.get(_weights(point))
        if record.get("status") == DONE:
            out.append(record["seconds"])
        else:
            out.append(tokens * median(rate) if rate and tokens else None)
    return out


def _weights(point: dict[str, Any]) -> str:
    return str(point["model_args"].get("pretrained"))

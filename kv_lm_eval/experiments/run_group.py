"""Points of a sweep that differ in their method alone share the loaded model, and the prefill of each prompt.

The first of a group is run as it would be alone, and what it is asked is answered for the others on the way
(`sharing.answered_by`). Then each of them has its own run, which goes on with these answers as it would after an
interruption: the same files, the same numbers. A point has no times of its own then; its seconds are its share.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kv_lm_eval import files, plugin
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments.plan import DECIDING_KEYS, OTHER_KEYS
from kv_lm_eval.experiments.run_point import (
    ANSWERS,
    DONE,
    LOG,
    RECORD,
    REQUESTS,
    KeptLog,
    can_resume,
    captured,
    loaded,
    run_point,
    sizes_of,
)

Job = tuple[dict[str, Any], Path]


def groups(jobs: Sequence[Job], at_least: int = 1) -> list[list[Job]]:
    """The jobs by what they share, in the order of the first of each group.

    Args:
        at_least: groups are halved until there are so many, as for that many processes.
    """
    alike: dict[Any, list[Job]] = defaultdict(list)
    for i, job in enumerate(jobs):
        alike[_shared(job[0]) or i].append(job)
    found = list(alike.values())
    while len(found) < at_least and (largest := max(found, key=len, default=[])) and len(largest) > 1:
        middle, at = (len(largest) + 1) // 2, found.index(largest)
        found[at : at + 1] = [largest[:middle], largest[middle:]]
    return found


def _shared(point: dict[str, Any]) -> str | None:
    """Equal for points of one model that are asked the same; None for one that shares nothing."""
    if point["model"] != plugin.MODEL_NAME:
        return None
    from kv_lm_eval import config, harness

    compression, engine, rest = config.parse(dict(point["model_args"]), pass_through=harness.hf_arguments())
    if not compression.method.uses_cache:
        return None
    asked = {**vars(engine), "question_in_prompt": engine.question_in_prompt or not compression.lossy}
    run = {key: point.get(key) for key in (*DECIDING_KEYS, *OTHER_KEYS)}
    return json.dumps([rest, asked, run], sort_keys=True, default=repr)


def run_group(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Runs the points of a group and returns their records, which are also in their folders.

    Raises:
        UserError: there is no room on the disk.
    """
    if len(jobs) == 1:
        yield run_point(*jobs[0])
        return
    (first, folder), *rest = jobs
    from kv_lm_eval.sharing import answered_by

    start, records = time.perf_counter(), list[dict[str, Any]]()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with captured(folder / LOG):
            lm = loaded(first)
    except (Exception, SystemExit):  # its own run meets and records the same
        for job in jobs:
            yield run_point(*job)
        return
    others = [_under(lm, *job) for job in rest]
    resumed = []
    with ExitStack() as ready:
        for (point, its), other in zip(rest, others, strict=True):
            resumed.append(can_resume(its, point["model"]))
            if other is not None:
                log = KeptLog.of(type(lm.compression_log)(), its / REQUESTS)
                ready.enter_context(answered_by(lm, other, str(its / ANSWERS), log))
        records.append(run_point(first, folder, lm))
    yield records[0]
    for (point, its), other, before in zip(rest, others, resumed, strict=True):
        records.append(run_point(point, its, other, before))
        yield records[-1]
    _share_time([its for _, its in jobs], records, time.perf_counter() - start)


def _under(lm: Any, point: dict[str, Any], folder: Path) -> Any:
    """The loaded model under a point's settings; None where that is not possible, which its own run will tell."""
    from kv_lm_eval.sharing import under

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with captured(folder / LOG):
            return under(lm, **point["model_args"], **sizes_of(point))
    except (UserError, ValueError):
        return None


def _share_time(folders: Sequence[Path], records: Sequence[dict[str, Any]], seconds: float) -> None:
    """Every point that is done took an equal part."""
    done = [(folder, record) for folder, record in zip(folders, records, strict=True) if record["status"] == DONE]
    for folder, record in done:
        record["seconds"] = round(seconds / len(records), 2)
        kept = files.read_json(folder / RECORD, dict[str, Any])
        files.write_json(folder / RECORD, {**kept, "seconds": record["seconds"]})

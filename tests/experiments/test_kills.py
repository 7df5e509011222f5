"""A sweep that is killed (SIGKILL) anywhere goes on to the same tables; one whose disk is full says so and goes on too.

Each sweep runs in a forked child, which has everything imported already, over a model that answers by a hash of the
prompt.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tqdm
import yaml
from experiments import stub
from torch.utils import collect_env

import kv_lm_eval.model  # noqa: F401  (imported once, here)
from kv_lm_eval import files, harness
from kv_lm_eval.experiments import run_point, sweep

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the children are forked")
KILLED = 77  # the status of a child that ended itself
STUCK_S = 300  # seconds after which a child ends, so that a test of it fails rather than waits
CONFIG = {
    "defaults": {"model": stub.NAME, "bootstrap_iters": 2, "limit": 2, "wait_s": 0.05},
    "models": ["kv-tiny"],
    "tasks": ["kv_quickstart_needle"],
    "methods": [{"seed": 1}, {"seed": 2}],
}


@pytest.fixture(scope="module", autouse=True)
def light() -> None:
    """No threads at a fork, and no look at the machine in every child."""
    stub.register()
    tqdm.tqdm.monitor_interval = 0
    if tqdm.tqdm.monitor is not None:  # of a file that ran before, whose lock a child would wait for
        tqdm.tqdm.monitor.exit()
        tqdm.tqdm.monitor = None
    harness._look_at_the_machine_once()
    collect_env.get_pretty_env_info()
    gc.freeze()  # else every child walks the parent's objects


def fork(output: Path, before: Callable[[], None] = lambda: None, points: int = 1) -> int:
    """A child that runs the sweep, or its first points; returns its process."""
    config = output.parent / "config.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "methods": CONFIG["methods"][:points]}))
    if child := os.fork():
        return child
    signal.alarm(STUCK_S)
    tqdm.tqdm.set_lock(threading.RLock())  # a thread of the parent may have held the old one
    with open(output.parent / "said.txt", "a", encoding="utf-8") as said:
        sys.stdout = sys.stderr = said
        status = 1
        try:
            before()
            status = sweep.main([str(config), "--output_path", str(output)])
        finally:
            said.flush()
            os._exit(status)


def ended(child: int) -> int:
    """The child's status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def table(output: Path) -> list[Any]:
    """What must not depend on how a sweep came to its end; every file is read to its end on the way."""
    rows = []
    for point in files.read_json(output / "plan.json")["points"]:
        folder = output / "points" / point["id"]
        record = files.read_json(folder / "point.json")
        assert record["status"] == "done" and run_point.why_not_done(record, folder) is None
        (results,) = folder.rglob("results_*.json")
        (samples,) = folder.rglob("samples_*.jsonl")
        assert results == folder / record["results_file"]
        scores = files.read_json(results)["results"]
        answers = [(s["doc_id"], s["resps"], s["exact_match"]) for _, s in files.read_jsonl(samples)]
        left = [file.name for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
        assert sorted(left) == sorted(["point.json", "log.txt", results.name, samples.name])
        rows.append((point["seed"], scores, answers))
    return rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, light: None) -> tuple[list[Any], float]:
    """The table, and the seconds that it took."""
    output, start = tmp_path_factory.mktemp("undisturbed") / "out", time.monotonic()
    assert ended(fork(output, points=2)) == 0, (output.parent / "said.txt").read_text()
    return table(output), time.monotonic() - start


@pytest.mark.parametrize("trials", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_to_the_same_table(
    trials: int, undisturbed: tuple[list[Any], float], tmp_path: Path
) -> None:
    rng, hits = random.Random(trials), 0
    for trial in range(trials):
        output = tmp_path / str(trial) / "out"
        output.parent.mkdir()
        child = fork(output, points=2)
        time.sleep(rng.uniform(0, undisturbed[1]))
        os.kill(child, signal.SIGKILL)
        hits += ended(child) == -signal.SIGKILL
        assert ended(fork(output, points=2)) == 0, (output.parent / "said.txt").read_text()
        assert table(output) == undisturbed[0]
    assert hits > trials / 2


class Counter:
    """Counts what touches the disk, and does something else instead of the n-th."""

    NAMES = (("replace", os), ("fsync", os), ("unlink", os), ("truncate", os), ("rename", os))

    def __init__(self, at: int, instead: Callable[[Any, tuple[Any, ...]], Any]) -> None:
        self.at, self.instead, self.count = at, instead, 0

    def install(self) -> None:
        for name, module in self.NAMES:
            setattr(module, name, self.wrapped(getattr(module, name)))

    def wrapped(self, original: Any) -> Any:
        return lambda *args, **more: self.next(lambda *a: original(*a, **more), args)

    def next(self, original: Any, args: tuple[Any, ...]) -> Any:
        self.count += 1
        return self.instead(original, args) if self.count == self.at else original(*args)


def die_before(original: Any, args: tuple[Any, ...]) -> None:
    os._exit(KILLED)


def die_after(original: Any, args: tuple[Any, ...]) -> None:
    try:
        original(*args)
    finally:
        os._exit(KILLED)


@pytest.mark.parametrize(
    ("first", "step"), [(1, 5), *(pytest.param(n, 5, marks=pytest.mark.slow) for n in range(2, 6))]
)
def test_killed_between_any_two_writes_it_goes_on_to_the_same_table(
    first: int, step: int, undisturbed: tuple[list[Any], float], tmp_path: Path
) -> None:
    """Every step-th of them, before and after in turn; all of them over the five parameters."""
    at, killed = first, True
    while killed:
        output = tmp_path / str(at) / "out"
        output.parent.mkdir()
        counter = Counter(at, die_before if at % 2 else die_after)
        status = ended(fork(output, counter.install))
        killed = status == KILLED
        assert killed or status == 0
        assert ended(fork(output)) == 0, (output.parent / "said.txt").read_text()
        assert table(output) == undisturbed[0][:1]
        at += step
    assert at > first + 4 * step, "the sweep writes more often than that"


def no_room(original: Any, args: tuple[Any, ...]) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("first", "step"), [(3, 6), *(pytest.param(n, 6, marks=pytest.mark.slow) for n in (1, 2, 4, 5, 6))]
)
def test_a_full_disk_is_a_status_and_a_line_and_nothing_is_lost(
    first: int, step: int, undisturbed: tuple[list[Any], float], tmp_path: Path
) -> None:
    """One write fails. The sweep may end well only if its table is whole; started again it does."""
    at, counted = first, True
    while counted:
        output = tmp_path / str(at) / "out"
        output.parent.mkdir()
        reached = output.parent / "reached"

        def failing(original: Any, args: tuple[Any, ...], reached: Path = reached) -> None:
            reached.write_text("")
            no_room(original, args)

        status = ended(fork(output, Counter(at, failing).install))
        counted = reached.exists()
        said = (output.parent / "said.txt").read_text()
        if status == 0:
            assert table(output) == undisturbed[0][:1]
        else:
            assert status in (1, 2) and "Traceback" not in said
            assert "No space left on device" in said
        if status != 0:
            retried = fork(output)
            assert ended(retried) == 0, (output.parent / "said.txt").read_text()
            assert table(output) == undisturbed[0][:1]
        at += step


@pytest.mark.parametrize("damage", ["cut", "empty", "binary", "gone"])
@pytest.mark.parametrize("pattern", ["point.json", "results_*.json", "samples_*.jsonl"])
def test_a_done_point_that_lost_a_file_is_run_again(
    damage: str, pattern: str, undisturbed: tuple[list[Any], float], done: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(done, output)
    file = sorted(output.rglob(pattern))[0]
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "binary": bytes(range(256))}[damage])
    assert ended(fork(output)) == 0
    assert table(output) == undisturbed[0][:1]
    last = (tmp_path / "said.txt").read_text().splitlines()[-1]
    assert json.loads(last)["run_now"] == 1


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, light: None) -> Path:
    output = tmp_path_factory.mktemp("done") / "out"
    assert ended(fork(output)) == 0
    return output

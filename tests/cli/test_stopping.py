"""Ctrl-C and SIGTERM: one line that says what is kept and how to go on, and the status; the second one ends at once."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from kv_lm_eval import console, progress
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import sweep


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")],
)
def test_a_signal_is_one_line_and_its_status(number: int, status: int, word: str, capsys: Any) -> None:
    before = signal.getsignal(number)
    cleaned = []

    def work() -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            cleaned.append(True)
        return 0

    try:
        assert console.command("sweep", work, lambda: "2 of 3 points are done.") == status
        assert signal.getsignal(number) == signal.SIG_DFL, "the second one ends at once"
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == f"\nsweep stopped by {word}. 2 of 3 points are done.\n" and cleaned


def test_signals_are_given_back_and_those_of_others_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        interrupt = signal.getsignal(signal.SIGINT)
        assert console.command("x", lambda: os.kill(os.getpid(), signal.SIGTERM) or 0) == 0
        assert seen == [signal.SIGTERM] and signal.getsignal(signal.SIGINT) == interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_it_works_outside_the_main_thread(capsys: Any) -> None:
    out: list[int] = []
    thread = threading.Thread(target=lambda: out.append(console.command("x", lambda: 0)))
    thread.start()
    thread.join()
    assert out == [0]


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("a\nb"), 2), (RuntimeError("a\nb"), 1), (BrokenPipeError(), 141), (MemoryError(), 1)],
)
def test_every_other_end_has_its_status(error: BaseException, status: int, capfd: Any) -> None:
    def work() -> int:
        raise error

    stdout = os.dup(1)
    try:
        assert console.command("x", work) == status
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    said = capfd.readouterr().err
    assert said.startswith("\nx stopped: ") and "Traceback" not in said


def test_a_task_file_that_is_no_yaml_is_the_user_s_mistake(capfd: Any) -> None:
    assert console.command("x", lambda: yaml.safe_load("a: [1\nb: }")) == 2
    assert "Error:" not in capfd.readouterr().err


LOOP = """
import sys, time
from kv_lm_eval import console
def work():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("closing", flush=True)
        time.sleep(60)
sys.exit(console.command("x", work))
"""


def test_the_second_ctrl_c_kills() -> None:
    with subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"begun\n"
        run.send_signal(signal.SIGINT)
        assert run.stdout.readline() == b"closing\n"
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=10) == -signal.SIGINT


def test_a_stopped_sweep_says_how_many_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("models: [kv-tiny]\ntasks: [kv_needle_magic]\nmethods: [full, {method: h2o, keep_ratio: 0.5}]\n")

    def run_group(jobs: list[Any]) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_group", run_group)
    assert sweep.main([str(config), "--output_path", str(tmp_path / "out")]) == 130
    assert f"0 of 2 points are done and kept in {tmp_path / 'out'}" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what is left


def test_a_log_gets_a_line_a_minute_that_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with progress.Bar(total=4000, desc="requests", file=out, mininterval=0) as bar:
        bar.start_t = bar._time() - 3600
        for step in range(4000):
            now[0] += 0.9
            bar.update()
            assert out.getvalue().count("\n") <= 2 + step * 0.9 / progress.SECONDS
    lines = out.getvalue().splitlines()
    assert 55 <= len(lines) <= 62 and "\r" not in out.getvalue()
    assert lines[0].startswith("requests: 0 of 4,000")
    assert " of 4,000, 60 min so far, about " in lines[30] and lines[30].endswith(" left")
    assert lines[-1].startswith("requests: 4,000 of 4,000") and "left" not in lines[-1]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    with progress.Bar(total=3, desc="requests", file=out) as bar:
        bar.update(3)
    assert "\r" in out.getvalue() and "100%" in out.getvalue()


def test_a_minute_without_an_end_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep's point may take hours, and its own bar goes to the point's log."""
    monkeypatch.setattr(progress, "SECONDS", 0.02)
    out, log = io.StringIO(), io.StringIO()
    with progress.told_every_minute(lambda: f"point 1; {progress.innermost()}", out):
        with progress.Bar(total=3, desc="requests", file=log) as bar:
            bar.update()
            time.sleep(0.1)
        assert "point 1; requests: 1 of 3" in out.getvalue()
    assert progress.innermost() == ""
    told = out.getvalue()
    time.sleep(0.05)
    assert out.getvalue() == told

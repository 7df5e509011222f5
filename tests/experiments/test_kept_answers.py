"""What an interrupted run left is read back exactly, and nothing in it can run code."""

from __future__ import annotations

import json
import os
import pickle
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import run_point
from kv_lm_eval.metrics.compression import CompressionLog, RequestId, RequestRecord, records_of
from kv_lm_eval.metrics.latency import Timing
from kv_lm_eval.requests import kept_answers
from kv_lm_eval.requests.document_scores import DocumentRecord, DocumentScore

ROOT = Path(__file__).parents[2]


class Bomb:
    """Pickled, it makes a file when it is read back."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


ANSWERS = st.one_of(
    st.text(st.characters(exclude_categories=[])),
    st.floats(allow_nan=False),
    st.tuples(st.floats(allow_nan=False), st.booleans()),
)


@given(ANSWERS)
def test_answers_come_back_as_they_were(answer: Any) -> None:
    back = kept_answers.decode(kept_answers.encode(answer), "file")
    assert back == answer and type(back) is type(answer)


@pytest.mark.parametrize("slots", [None, np.arange(5, dtype=np.int32)])
def test_a_document_s_score_comes_back_with_its_record(slots: np.ndarray | None) -> None:
    rng = np.random.default_rng(0)
    log_probs = rng.normal(size=5).astype(np.float32)
    log_probs[0] = np.nan
    record = DocumentRecord(
        {"protocol": "streaming"}, "m", {"a": 1}, np.arange(5, dtype=np.int32), log_probs, log_probs > 0, slots
    )
    record.evictions, record.end = [(3, 1), (4, 2)], 17
    answer = DocumentScore(record)
    back = kept_answers.decode(kept_answers.encode(answer), "file")
    assert float(back) == float(answer) and isinstance(back, DocumentScore)
    for name, value in vars(record).items():
        other = getattr(back.record, name)
        if isinstance(value, np.ndarray):
            assert other.dtype == value.dtype
            np.testing.assert_array_equal(other, value)
        else:
            assert other == value


@pytest.mark.parametrize("text", ["", "{", "{}", '{"document": 1}', '{"document": {"tokens": 1}}', "\x80\x04"])
def test_a_damaged_answer_is_a_user_error_that_names_the_file(text: str) -> None:
    with pytest.raises(UserError, match="answers.db"):
        kept_answers.decode(text, "answers.db")


def test_an_array_of_objects_is_refused() -> None:
    stored = {"document": {"tokens": {"dtype": "|O", "shape": [1], "base64": "AAAAAAAAAAA="}}}
    with pytest.raises(UserError):
        kept_answers.decode(json.dumps(stored), "file")


def test_lm_eval_s_own_cache_file_is_not_unpickled(tmp_path: Path) -> None:
    """Rows of lm-eval's, and pickles in our table, from somebody else."""
    from sqlitedict import SqliteDict

    file, bomb = tmp_path / "answers.db", tmp_path / "ran"
    with SqliteDict(str(file), autocommit=True) as theirs:
        theirs["x"] = Bomb(bomb)
    mine = SqliteDict(str(file), autocommit=True)
    kept_answers.keep_as_json(mine)
    assert "x" not in mine and list(mine.items()) == []
    mine["y"] = (-1.5, True)
    assert mine["y"] == (-1.5, True)
    mine.close()
    assert kept_answers.is_whole(file)
    with sqlite3.connect(file) as raw:
        raw.execute(f'INSERT INTO "unnamed{kept_answers.ENDING}" VALUES (?, ?)', ("x", pickle.dumps(Bomb(bomb))))
    assert not kept_answers.is_whole(file)
    mine = SqliteDict(str(file), autocommit=True)
    kept_answers.keep_as_json(mine)
    with pytest.raises(UserError, match="damaged"):
        mine["x"]
    mine.close()
    assert not bomb.exists()


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_file_cut_off_is_not_whole(keep: float, tmp_path: Path) -> None:
    from sqlitedict import SqliteDict

    file = tmp_path / "answers.db"
    mine = SqliteDict(str(file), autocommit=True)
    kept_answers.keep_as_json(mine)
    for i in range(200):
        mine[str(i)] = "x" * 500
    mine.close()
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    assert not kept_answers.is_whole(file)
    file.write_bytes(b"not a database at all" * 100)
    assert not kept_answers.is_whole(file)


def record(prompt: str) -> RequestRecord:
    return RequestRecord("task", "generate_until", 7, True, 0.5, 1.0, 2.0, 3.0, 0.0, 4, prompt)


def batch(*prompts: str) -> list[RequestRecord]:
    n = len(prompts)
    prefill = {"seen": [7] * n, "compressed": [True] * n, "kv_bytes_valid": [np.float64(1.0)] * n}
    end = {
        "compressed": [True] * n,
        "kept_fraction": [0.5] * n,
        "kv_bytes_valid": [2.0] * n,
        "kv_bytes_allocated": 3.0,
        "overhead_bytes": 0,
        "peak_slots": [4] * n,
        "timing": [Timing(1, False, 0.5, None, None, None, 3, 0.25)] * n,
    }
    return records_of([RequestId("task", "generate_until", 0, 0, prompt) for prompt in prompts], prefill, end)


def test_records_survive_and_count_once(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    first = run_point.KeptLog.of(CompressionLog(), file)
    first.add_batch(batch("a", "b"))
    first.add_batch(batch("c"))
    again = run_point.KeptLog.of(CompressionLog(), file)
    assert again.records == first.records and isinstance(again.records[0].timing, Timing)
    again.add_batch(batch("c", "d"))
    assert [r.prompt for r in run_point.KeptLog.of(CompressionLog(), file).records] == [r.prompt for r in again.records]
    assert len(again.records) == 4
    assert again.summary()["requests"] == 4


@pytest.mark.parametrize("keep", range(0, 400, 37))
def test_a_torn_last_line_is_ignored_and_any_other_damage_is_told(keep: int, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    log = run_point.KeptLog.of(CompressionLog(), file)
    for prompt in "abc":
        log.add_batch(batch(prompt))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - keep])
    assert run_point.KeptLog.damage(file) is None
    whole = (data[: len(data) - keep]).count(b"\n")
    assert len(run_point.KeptLog.of(CompressionLog(), file).records) == whole
    file.write_bytes(b"x" + data)
    assert run_point.KeptLog.damage(file) is not None
    file.write_bytes(b'[{"task": "only"}]\n')
    assert run_point.KeptLog.damage(file) is not None


def test_a_point_from_somebody_else_runs_no_code(tmp_path: Path) -> None:
    bomb = tmp_path / "ran"
    for name in ("requests.pickle", "requests.jsonl", "answers_rank0.db", "point.json"):
        (tmp_path / name).write_bytes(pickle.dumps([Bomb(bomb)]))
    assert run_point.read_record(tmp_path) == {}
    assert not run_point.can_resume(tmp_path, "kvcompressed")
    assert not (tmp_path / "answers_rank0.db").exists(), "answers and records are believed together or not at all"
    assert not bomb.exists()


def test_nothing_in_the_packages_unpickles() -> None:
    unsafe = re.compile(r"pickle\.loads?\(|cPickle|dill|joblib\.load|yaml\.(unsafe_|full_)?load\(|torch\.load\(")
    for package in ("kv_lm_eval", "needle", "longbench_tasks", "scripts"):
        for file in (ROOT / package).rglob("*.py"):
            for line in file.read_text(encoding="utf-8").splitlines():
                assert not unsafe.search(line) or "weights_only=True" in line, f"{file}: {line}"

"""lm-eval's --use_cache knows neither model nor method; ours does."""

from __future__ import annotations

import math
import os
import pickle
import sqlite3

import numpy as np
import pytest
from lm_eval.api.model import CachingLM
from model.test_requests import STORY, load, request

from kv_lm_eval.errors import OUT_OF_MEMORY, UserError
from kv_lm_eval.requests import kept_answers, request_cache
from kv_lm_eval.requests.document_scores import DocumentRecord, DocumentScore

pytestmark = pytest.mark.filterwarnings("ignore")


def ask(lm, path, own_hook: bool):
    if not own_hook:  # lm-eval's own behaviour, for the comparison
        lm.set_cache_hook = lambda hook: setattr(lm, "cache_hook", hook)
    caching = CachingLM(lm, str(path))
    letters = [request("loglikelihood", STORY * 3 + "The answer is", f" {c}") for c in ("48213", "9")]
    got = [s for s, _ in caching.loglikelihood(letters)]
    caching.dbdict.close()
    return got


SNAPKV = {"method": "snapkv", "max_capacity_prompt": 24, "window_size": 8}


@pytest.mark.parametrize("own_hook", [False, True], ids=["stock", "ours"])
def test_two_methods_share_answers_under_the_stock_cache_and_never_under_ours(own_hook, tmp_path):
    full = ask(load("kvcompressed", method="full"), tmp_path / "a.db", own_hook)
    compressed = ask(load("kvcompressed", **SNAPKV), tmp_path / "a.db", own_hook)
    assert (compressed == full) is not own_hook


def test_the_same_settings_are_answered_from_the_cache_and_others_are_not(tmp_path, monkeypatch):
    first = load("kvcompressed", **SNAPKV)
    expected = ask(first, tmp_path / "a.db", own_hook=True)
    again = load("kvcompressed", **SNAPKV)
    monkeypatch.setattr(again, "loglikelihood", None)  # would fail if it were asked
    assert ask(again, tmp_path / "a.db", own_hook=True) == expected
    for other in ({"tail_tokens": 2}, {"kernel_size": 5}, {"max_capacity_prompt": 25}, {"max_length": 1000}):
        assert load("kvcompressed", **{**SNAPKV, **other}).fingerprint() != first.fingerprint()


def test_fewer_layers_are_another_model(tmp_path):
    """What from_pretrained gets unread decides answers too."""
    whole = ask(load("kvcompressed", method="full"), tmp_path / "a.db", own_hook=True)
    one_layer = {"method": "full", "model_kwargs": {"num_hidden_layers": 1}}
    cut = ask(load("kvcompressed", **one_layer), tmp_path / "a.db", own_hook=True)
    assert cut != whole
    assert cut == ask(load("kvcompressed", **one_layer), tmp_path / "b.db", own_hook=True)


def record() -> DocumentRecord:
    return DocumentRecord(
        reading={"protocol": "streaming", "max_eval_tokens": None},
        model="kv-tiny",
        settings={"method": "full"},
        tokens=np.arange(5, dtype=np.int32),
        log_probs=np.array([np.nan, -0.1, -1 / 3, -1e-30, -7], dtype=np.float32),
        greedy=np.array([False, True, True, False, True]),
        slots=np.arange(5, dtype=np.int32),
        evictions=[(3, 1), (4, 2)],
        end=17,
    )


@pytest.mark.parametrize(
    "answer", ["", "x", "a\ud800\n\0", "<out>", -1 / 3, -math.inf, 0.0, (-1 / 3, True), (-0.0, False)]
)
def test_every_answer_comes_back_as_it_was(answer):
    again = kept_answers.decode(kept_answers.encode(answer), "here")
    assert again == answer and type(again) is type(answer)


def test_a_document_comes_back_with_every_bit_of_its_record():
    for changes in ({}, {"slots": None}, {"log_probs": record().log_probs.astype(np.float64)}):
        answer = DocumentScore(DocumentRecord(**{**vars(record()), **changes}))
        again = kept_answers.decode(kept_answers.encode(answer), "here")
        assert float(again) == float(answer)
        for name, value in vars(answer.record).items():
            got = getattr(again.record, name)
            if isinstance(value, np.ndarray):
                assert got.dtype == value.dtype and got.tobytes() == value.tobytes()
            else:
                assert got == value


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


def rows(path):
    with sqlite3.connect(path) as conn:
        (table,) = [n for (n,) in conn.execute("SELECT name FROM sqlite_master WHERE type='table'") if n != "unnamed"]
        return table, conn.execute(f'SELECT key, value FROM "{table}"').fetchall()


def rewrite(path, change):
    table, kept = rows(path)
    with sqlite3.connect(path) as conn:
        for key, value in kept:
            conn.execute(f'UPDATE "{table}" SET value = ? WHERE key = ?', (change(value), key))
    conn.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: pickle.dumps(Evil()),
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: None,
        lambda text: os.urandom(50),
        lambda text: "[1]",
        lambda text: '["a", true]',
        lambda text: "[1, 2]",
        lambda text: "true",
        lambda text: "null",
        lambda text: "{}",
        lambda text: '{"document": {"tokens": []}}',
        lambda text: '{"document": [1]}',
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_answer_is_asked_again_and_nothing_in_the_file_runs(change, tmp_path):
    path = tmp_path / "a.db"
    expected = ask(load("kvcompressed", **SNAPKV), path, own_hook=True)
    rewrite(path, change)
    assert ask(load("kvcompressed", **SNAPKV), path, own_hook=True) == expected
    assert not Evil.ran
    assert [kept_answers.decode(value, "here")[0] for _, value in rows(path)[1]] == expected


def test_answers_that_ran_out_of_memory_are_asked_again(tmp_path):
    path = tmp_path / "a.db"
    expected = ask(load("kvcompressed", **SNAPKV), path, own_hook=True)
    rewrite(path, lambda text: kept_answers.encode(OUT_OF_MEMORY))
    assert ask(load("kvcompressed", **SNAPKV), path, own_hook=True) == expected


@pytest.mark.parametrize("damage", ["cut", "page", "garbage"])
def test_a_damaged_file_is_named(damage, tmp_path):
    path = tmp_path / "a.db"
    ask(load("kvcompressed", **SNAPKV), path, own_hook=True)
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "page":
        path.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
    else:
        path.write_bytes(os.urandom(5000))
    with pytest.raises(UserError, match=r"a\.db is damaged"):
        request_cache.check_file(path)

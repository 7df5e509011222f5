"""lm-eval's --use_cache knows neither model nor method; ours does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from lm_eval.api.model import CachingLM
from model.test_requests import STORY, load, request

from kv_lm_eval import tiny

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


def test_retrained_weights_under_the_same_name_are_told_apart(tmp_path):
    for file in Path(tiny.path()).iterdir():
        shutil.copy(file, tmp_path)
    before = load("kvcompressed", pretrained=str(tmp_path), **SNAPKV).fingerprint()
    os.utime(tmp_path / "model.safetensors", ns=(0, 0))
    assert load("kvcompressed", pretrained=str(tmp_path), **SNAPKV).fingerprint() != before

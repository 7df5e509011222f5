"""Versions outside of what the tests were run with are said in the results file."""

import importlib.metadata

import pytest

from kv_lm_eval import versions


def test_an_untried_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(versions, "version", lambda p: "5.99.0" if p == "transformers" else real(p))
    assert "transformers 5.99.0 (tried: 5.20.0 to 5.24.0)" in versions.in_use()["untried"]


def test_the_range_begins_at_the_floors_of_the_package() -> None:
    required = importlib.metadata.requires("kv-lm-eval") or []
    for package, (low, _) in versions.TRIED.items():
        floor = next(r.split(">=")[1].split(";")[0].strip() for r in required if r.startswith(package))
        assert low.startswith(floor)

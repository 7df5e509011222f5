"""evaluate(methods=[...]): several methods in one call are what they are in a call each."""

from __future__ import annotations

from pathlib import Path

import pytest

from kv_lm_eval import UserError, evaluate

METHODS = [
    "full",
    {"method": "snapkv", "window_size": 16, "max_capacity_prompt": 64},
    {"method": "random", "keep_ratio": 0.2},
]
WORDS = {
    "tasks": "kv_quickstart_needle,kv_quickstart_choice,kv_quickstart_ppl",
    "limit": 2,
    "dtype": "float64",
    "device": "cpu",
    "bootstrap_iters": 2,
}


def test_several_methods_in_one_call_are_what_they_are_in_a_call_each(tmp_path: Path) -> None:
    together = evaluate("kv-tiny", methods=METHODS, output_path=tmp_path, **WORDS)
    assert len(together) == 3
    for got, asked in zip(together, METHODS, strict=True):
        own = {"method": asked} if isinstance(asked, str) else asked
        alone = evaluate("kv-tiny", **own, **WORDS)
        for task, numbers in alone["results"].items():
            for name, number in numbers.items():
                if isinstance(number, float):
                    assert got["results"][task][name] == pytest.approx(number, rel=1e-9), (asked, task, name)
        stats, of_alone = got["config"]["kv_stats"], alone["config"]["kv_stats"]
        assert stats["requests"] == of_alone["requests"] and stats["from_request_cache"] == 0
        assert stats["kept_fraction_mean"] == pytest.approx(of_alone["kept_fraction_mean"])
        assert got["config"]["kv_compression"] == alone["config"]["kv_compression"]
        texts = [[s["resps"] for s in one["samples"]["kv_quickstart_needle"]] for one in (got, alone)]
        assert texts[0] == texts[1]
    folders = sorted(p.name for p in tmp_path.iterdir())
    assert folders == ["1_full", "2_snapkv", "3_random"]
    assert all(list((tmp_path / name).rglob("results_*.json")) for name in folders)


def test_method_and_methods_are_two_ways_of_asking() -> None:
    with pytest.raises(UserError, match="give one of them"):
        evaluate("kv-tiny", method="full", methods=["full"], tasks="kv_quickstart")
    with pytest.raises(UserError, match="asks for nothing"):
        evaluate("kv-tiny", methods=[], tasks="kv_quickstart")


def test_a_method_with_weights_loaded_otherwise_runs_for_itself(tmp_path: Path) -> None:
    methods = [
        "full",
        {"method": "full", "dtype": "float32"},
        {"preset": "leaderboard/knorm", "compression_ratio": 0.5},
    ]
    words = {**WORDS, "tasks": "kv_quickstart_needle"}
    found = evaluate("kv-tiny", methods=methods, output_path=tmp_path, **words)
    assert [str(one["config"]["model_dtype"]) for one in found] == ["torch.float64", "torch.float32", "torch.float64"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1_full", "2_full", "3_knorm"]
    with pytest.raises(UserError, match="did you mean 'snapkv'"):
        evaluate("kv-tiny", methods=["full", "snapkw"], **words)

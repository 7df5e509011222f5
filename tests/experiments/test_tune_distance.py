"""tune --loss kl: how families are walked, how often a search is wrong, and the command on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kv_lm_eval import tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import descent, search, tune, tune_distance
from kv_lm_eval.stats import betting, limits

TEXTS = Path(tiny.__file__).parents[1] / "tasks" / "quickstart" / "texts"
TOLERANCE = 0.1


def drawn(rng: np.random.Generator, mean: float, texts: int) -> np.ndarray:
    """[texts, 2] KL summed over the tokens of texts that share what is hard about them, and the tokens."""
    tokens = rng.integers(40, 120, texts).astype(float)
    return np.stack([tokens * mean * rng.gamma(2.0, 0.5, texts), tokens], axis=1)


def walk(rng: np.random.Generator, means: list[float], texts: int, alpha: float, limit=limits.upper_limit):
    losses = [drawn(rng, mean, texts) for mean in means]
    asked: list[tuple[int, int]] = []

    def look(i: int, n: int) -> np.ndarray:
        asked.append((i, n))
        return losses[i][:n]

    return descent.descend(range(len(means)), look, descent.Terms(texts, TOLERANCE, alpha, 16, limit)), asked


def test_a_family_is_left_at_the_first_setting_that_is_not_shown() -> None:
    steps, asked = walk(np.random.default_rng(0), [0.01, 0.03, 0.08, 0.3], 24, 0.05)
    assert [s.decision for s in steps] == [search.WITHIN, search.WITHIN, search.UNDECIDED]
    assert 24 < steps[-1].needed and steps[0].needed is None
    assert asked == [(i, n) for i in range(3) for n in (16, 24)]
    bytes_of = {0: 9, 1: 5, 2: 1}.__getitem__
    assert descent.smallest(steps, bytes_of).candidate == 1 and descent.smallest(steps[2:], bytes_of) is None


def test_a_setting_far_outside_gets_no_more_than_the_first_texts() -> None:
    steps, asked = walk(np.random.default_rng(1), [1.0, 0.01], 40, 0.05)
    assert [s.decision for s in steps] == [search.OUTSIDE] and asked == [(0, 16)]
    assert steps[0].needed is None and steps[0].texts == 16


@pytest.mark.parametrize("means", [[0.1005], [0.02, 0.1005, 0.101], [0.1005] * 4, [0.3, 0.05, 0.101]])
def test_a_search_recommends_what_is_outside_no_more_often_than_it_says(
    means: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two families of these settings share the chance of an error; the truth is told from the means."""
    monkeypatch.setattr(limits, "DRAWS", 1000)
    rng, wrong, repeats, alpha = np.random.default_rng(2), 0, 200, 0.1
    for _ in range(repeats):
        steps = [s for _ in range(2) for s in walk(rng, means, 24, alpha / 2)[0]]
        wrong += any(s.decision == search.WITHIN and means[s.candidate] > TOLERANCE for s in steps)
    assert wrong / repeats <= alpha + 2.0 * (alpha * (1 - alpha) / repeats) ** 0.5


def test_bets_hold_where_a_few_texts_are_lost_altogether_and_the_other_limit_does_not() -> None:
    """One text in twenty is far off, so that a sample of 24 has none of them in three cases of ten."""
    rng, alpha, wrong = np.random.default_rng(3), 0.05, [0, 0]
    for _ in range(200):
        kl = np.where(rng.random(24) < 0.05, 1.9, 0.01)
        losses = np.stack([kl * 50, np.full(24, 50.0)], axis=1)
        for i, limit in enumerate((tune_distance.bet_on(2.0), limits.upper_limit)):
            wrong[i] += limit(losses, alpha) < 0.05 * 1.9 + 0.95 * 0.01
    assert wrong[0] <= 0.05 * 200 + 8 < 0.2 * 200 < wrong[1]
    assert tune_distance.bet_on(2.0)(np.array([[1000.0, 1.0]] * 9), alpha) == pytest.approx(2.0, abs=1e-3)


def parsed(*more: str) -> Any:
    given = ["--model_args", "pretrained=kv-tiny,method=snapkv,window_size=8,dtype=float32", "--tasks", "one"]
    return tune._parser().parse_args([*given, "--budgets", "64,16,32", "--loss", "kl", *more])


def test_families_are_of_one_method_each_and_what_is_refused_is_left_out() -> None:
    args = parsed("--try", "window_size=8,32", "--also", "method=quantized,nbits=8/2,residual_length=32")
    base = {"pretrained": "kv-tiny", "method": "snapkv", "window_size": 8, "dtype": "float32"}
    found, left_out = tune_distance.families(args, base)
    assert [[s.get("max_capacity_prompt", s.get("nbits")) for s in family] for family in found] == [
        [64, 16, 32], [64], [8, 2]
    ]  # fmt: skip
    assert found[2][0] == {"pretrained": "kv-tiny", "dtype": "float32", "method": "quantized", "nbits": 8,
                           "residual_length": 32}  # fmt: skip
    assert len(left_out) == 2 and all("window_size=32" in note for note in left_out)
    with pytest.raises(UserError, match="--also nbits=8: give method=NAME"):
        tune_distance.families(parsed("--also", "nbits=8"), base)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], str, list[int]]]:
    """Documents, of which two are about one text, say what a simple rule says; 4 tokens a document."""
    calls: list[Any] = []

    def run(self: Any, model_args: dict[str, Any], task: str, ids: list[int]) -> dict[str, Any]:
        calls.append((model_args, task, ids))
        kept = (
            {8: 500, 4: 250, 2: 130}[model_args["nbits"]]
            if "nbits" in model_args
            else model_args["max_capacity_prompt"]
        )
        kl = {500: 0.001, 250: 0.004, 130: 0.3, 256: 0.002, 128: 0.02, 64: 0.2}[kept]
        return {str(i): [4 * kl * (1 + 0.5 * np.sin(i // 2)), 0.0, 4.0, 1024.0 * kept] for i in ids}

    monkeypatch.setattr(tune_distance.Distances, "_run", run)
    monkeypatch.setattr(
        tune_distance.Distances, "_documents", lambda self: {"one": [[2 * i, 2 * i + 1] for i in range(40)]}
    )
    return calls


def asked_of(*more: str) -> list[str]:
    args = ["--model_args", "pretrained=kv-tiny,method=knorm", "--tasks", "one", "--loss", "kl"]
    args += ["--budgets", "64,256,128", "--also", "method=quantized,nbits=8/4/2"]
    return [*args, *more]


def test_the_fewest_bytes_of_all_families_are_recommended(told: list[Any], capsys: Any, tmp_path: Path) -> None:
    arguments = asked_of("--tolerance", "0.05", "--output_path", str(tmp_path))
    assert tune.main(arguments) == 0
    (answer,) = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert answer["model_args"] == "pretrained=kv-tiny,method=knorm,max_capacity_prompt=128"
    decided = {row["setting"]: row["decision"] for row in answer["rows"]}
    assert decided == {
        **{
            f"method=knorm,max_capacity_prompt={budget}": "within" if budget > 64 else "outside"
            for budget in (256, 128, 64)
        },
        **{f"method=quantized,nbits={bits}": "within" if bits > 2 else "outside" for bits in (8, 4, 2)},
    }
    assert answer["alpha_per_family"] == pytest.approx(0.025)
    assert all(model_args["fidelity"] is True for model_args, _, _ in told)
    count = len(told)
    assert tune.main(arguments) == 0 and len(told) == count  # all of it was kept
    assert tune.main(asked_of("--tolerance", "0.005")) == 0
    (answer,) = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert answer["model_args"] == "pretrained=kv-tiny,method=quantized,nbits=4"


def test_a_refusal_says_how_many_texts_it_would_take(told: list[Any], capsys: Any, monkeypatch: Any) -> None:
    arguments = asked_of("--tolerance", "0.00210")
    assert tune.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["answers"][0]["model_args"] is not None  # eight bits
    also = arguments.index("--also")
    knorm = arguments[:also] + arguments[also + 2 :]
    assert tune.main(knorm) == 0
    said = capsys.readouterr().out.splitlines()
    (answer,) = json.loads(said[-1])["answers"]
    assert answer["model_args"] is None and answer["needed"] > 40
    assert (
        f"method=knorm,max_capacity_prompt=256 would take about {answer['needed']} texts, {answer['needed'] - 40} more"
        in said[-2]
    )
    monkeypatch.setattr(tune_distance.Distances, "_documents", lambda self: {"one": [[i] for i in range(9)]})
    assert tune.main(knorm) == 0
    assert "refused: 9 texts, and it takes 16, 7 more" in capsys.readouterr().out
    assert tune.main([*knorm, "--largest", "1"]) == 0
    needed = betting.fewest(0.0021, 0.05)
    assert f"refused: 9 texts, and it takes {needed:d}" in capsys.readouterr().out


def test_what_does_not_go_together_is_refused(told: list[Any], capsys: Any) -> None:
    assert tune.main([*asked_of(), "--loss", "score"]) == 2
    assert "--also goes with --loss kl" in capsys.readouterr().err
    assert tune.main([*asked_of(), "--largest", "0.01"]) == 2
    assert "--largest 0.01 must be above --tolerance" in capsys.readouterr().err


def test_on_the_embedded_model_the_numbers_are_those_of_a_run_of_its_own(capsys: Any, tmp_path: Path) -> None:
    """Texts cut into 18 short ones: what is found of a setting is what lm-eval's results say of the same run."""
    whole = (TEXTS / "ferry.txt").read_text()
    for i in range(18):
        (tmp_path / f"{i:02}.txt").write_text(whole[200 * i : 200 * (i + 2)])
    arguments = ["--model_args", "pretrained=kv-tiny,dtype=float32,method=knorm", "--tasks", "kv_fidelity_file"]
    arguments += ["--budgets", "32", "--loss", "kl", "--tolerance", "0.5", "--device", "cpu", "--batch_size", "6"]
    arguments += ["--metadata", json.dumps({"text_files": str(tmp_path), "max_eval_tokens": 70})]
    assert tune.main([*arguments, "--output_path", str(tmp_path / "out")]) == 0
    (answer,) = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    (row,) = answer["rows"]
    from kv_lm_eval import evaluate

    found = evaluate(
        "kv-tiny", tasks=["kv_fidelity_file"], method="knorm", max_capacity_prompt=32, dtype="float32", device="cpu",
        metadata={"text_files": str(tmp_path), "max_eval_tokens": 70}, bootstrap_iters=0,
    )  # fmt: skip
    scores = found["results"]["kv_fidelity_file"]
    assert float(row["mean"]) == pytest.approx(scores["kl_mean,none"], rel=2e-3) and row["texts"] == 18
    assert row["tokens"] == scores["scored_tokens,none"]
    stats = found["config"]["kv_stats"]["by_task"]["kv_fidelity_file"]
    assert float(row["KiB"]) == pytest.approx(
        (stats["kv_bytes_prefill_mean"] + stats["overhead_bytes_mean"]) / 1024, abs=1
    )

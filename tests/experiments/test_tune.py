"""tune.py from its arguments to its answer; the model is replaced by scores whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kv_lm_eval.experiments import scores, tune
from kv_lm_eval.stats import betting  # noqa: E402

ARGUMENTS = [
    *("--model_args", "pretrained=kv-tiny,method=snapkv,tail_tokens=2", "--tasks", "one,two"),
    *("--budgets", "128,16,32,64", "--try", "window_size=8,16", "--tolerance", "0.1"),
]


def right(model_args: dict[str, Any], task: str, i: int) -> bool:
    """Full always is. snapkv needs a budget of 32 for task one, 64 for two; a window of 8 is wrong now and then."""
    if model_args["method"] == "full":
        return True
    enough = model_args["max_capacity_prompt"] >= {"one": 32, "two": 64}[task]
    return enough and not (model_args["window_size"] == 8 and i % 4 == 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], str, list[int]]]:
    calls: list[Any] = []

    def run(self: Any, model_args: dict[str, Any], task: str, ids: list[int]) -> dict[str, float]:
        calls.append((model_args, task, ids))
        return {str(i): float(right(model_args, task, i)) for i in ids}

    monkeypatch.setattr(tune.Scores, "_run", run)
    documents = {"one": [[i] for i in range(400)], "two": [[i] for i in range(300)][::-1]}
    monkeypatch.setattr(tune.Scores, "_documents", lambda self: documents)
    return calls


def answers(capsys: Any) -> dict[str, Any]:
    lines = capsys.readouterr().out.splitlines()
    return {"+".join(a["tasks"]): a["model_args"] for a in json.loads(lines[-1])["answers"]}


def test_the_recommended_line_for_each_task_and_for_all(asked: list[Any], capsys: Any) -> None:
    assert tune.main(ARGUMENTS) == 0
    line = "pretrained=kv-tiny,method=snapkv,tail_tokens=2,max_capacity_prompt={},window_size=16"
    assert answers(capsys) == {"one": line.format(32), "two": line.format(64), "one+two": line.format(64)}
    full = [model_args for model_args, _, _ in asked if model_args["method"] == "full"]
    assert all(model_args == {"pretrained": "kv-tiny", "method": "full", "tail_tokens": 2} for model_args in full)
    questions = [(str(model_args), task, i) for model_args, task, ids in asked for i in ids]
    assert len(questions) == len(set(questions)), "no document is asked twice"


def test_impossible_candidates_are_left_out_and_none_is_an_answer(asked: list[Any], capsys: Any) -> None:
    assert tune.main([*ARGUMENTS, "--budgets", "16,24", "--tasks", "two"]) == 0
    said = capsys.readouterr().out
    assert "left out: max_capacity_prompt=16,window_size=16" in said
    assert "3 candidates and" in said and "none within tolerance\n" in said


def test_too_few_documents_are_told_before_anything_runs(asked: list[Any], capsys: Any) -> None:
    assert tune.main([*ARGUMENTS, "--tolerance", "0.01"]) == 0
    assert "cannot show a loss of at most 0.01" in capsys.readouterr().out
    assert not asked


def test_an_interrupted_search_goes_on_with_its_scores(asked: list[Any], tmp_path: Path, capsys: Any) -> None:
    output = ["--output_path", str(tmp_path)]
    assert tune.main([*ARGUMENTS, *output]) == 0
    first = answers(capsys)
    asked.clear()
    assert tune.main([*ARGUMENTS, *output]) == 0
    assert answers(capsys) == first and not asked
    assert json.loads((tmp_path / "tune.json").read_text())["samples_run"] == 0


def test_documents_about_one_text_are_drawn_together_and_alike_for_all_tasks() -> None:
    labels = [[0, 0, 1, 1, 2, 2, 3, 3], [3, 2, 1, 0], [9]]
    one, two, three = scores.drawn_texts(labels, 5, None)
    assert sorted(map(tuple, one)) == [(0, 1), (2, 3), (4, 5), (6, 7)] and three == [[0]]
    assert [labels[0][text[0]] for text in one] == [labels[1][text[0]] for text in two], "the same text first"
    assert scores.drawn_texts(labels, 5, 5)[0] == one[:2], "whole texts"
    orders = {str(scores.drawn_texts(labels, seed, None)[0]) for seed in range(20)}
    assert len(orders) > 10


def test_every_document_and_every_task_counts_alike_whatever_the_size_of_its_texts(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = {"one": [[0, 1, 2, 3], [4], [5, 6, 7]], "two": [[0], [1], [2]]}
    monkeypatch.setattr(tune.Scores, "_documents", lambda self: documents)
    scores = tune.Scores(tune._parser().parse_args(ARGUMENTS))
    settings = {"max_capacity_prompt": 64, "window_size": 8}  # loses documents 0, 4 and 8
    for tasks, loss in ((["one"], 2 / 8), (["two"], 1 / 3), (["one", "two"], (2 / 8 + 1 / 3) / 2)):
        losses = scores.losses(tasks, settings, 3)
        assert betting.mean(losses) == pytest.approx(loss)
        assert losses[:, 1].max() == 1 and (abs(losses[:, 0]) <= losses[:, 1]).all()


def test_all_answers_hold_together(asked: list[Any], capsys: Any) -> None:
    assert tune.main(ARGUMENTS) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    candidates = 7  # a window of 16 does not fit a budget of 16
    assert [a["alpha_per_candidate"] for a in document["answers"]] == pytest.approx([0.05 / candidates / 3] * 3)


@pytest.mark.slow
def test_documents_are_those_of_the_task_and_scores_those_of_lm_eval(tmp_path: Path, capsys: Any) -> None:
    """The real thing, as few documents as it takes to be told that a cache of 16 pairs is not enough."""
    arguments = ["--model_args", "pretrained=kv-tiny,dtype=float32,method=window", "--tasks", "kv_needle_magic"]
    arguments += ["--budgets", "16", "--tolerance", "0.5", "--device", "cpu", "--batch_size", "8", "--first_look", "24"]
    arguments += ["--metadata", '{"lengths":[256],"depths":[10],"samples_per_cell":32}', "--output_path", str(tmp_path)]
    assert tune.main(arguments) == 0
    (answer,) = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    (row,) = answer["rows"]
    assert (row["decision"], row["texts"], row["documents"], row["score"]) == ("outside", 24, 24, "0.000")
    assert float(row["full"]) > 0.8
    kept = json.loads((tmp_path / "scores.json").read_text())
    assert [len(scores) for scores in kept.values()] == [24, 24]

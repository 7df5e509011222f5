"""`kv-lm-eval compare`: two runs on the same documents; wrong files are one line."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from reporting.results import FULL, mean_task, perplexity_task, run, snapkv

from kv_lm_eval import cli
from kv_lm_eval.reporting import load, rows
from kv_lm_eval.stats import mcnemar

A = [1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1]
B = [1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    run(tmp_path / "full", FULL, {"qa": mean_task(A), "text": perplexity_task([(-9.0 - i, 5) for i in range(8)])})
    run(tmp_path / "snap", snapkv(), {"qa": mean_task(B), "text": perplexity_task([(-9.5 - i, 5) for i in range(8)])})
    return tmp_path / "full", tmp_path / "snap"


def compare(*arguments: Any, capsys: Any) -> tuple[list[str], dict[str, Any]]:
    assert cli.main(["compare", *map(str, arguments)]) == 0
    out = capsys.readouterr().out.splitlines()
    return out, {score["task"]: score for score in json.loads(out[-1])["scores"]}


def test_differences_flips_and_tests_are_those_of_a_plain_count(two, capsys):
    out, found = compare(*two, "--flips", 3, capsys=capsys)
    qa, text = found["qa"], "\n".join(out)
    assert qa["difference"] == pytest.approx(fmean(B) - fmean(A))
    flips = {i: b - a for i, (a, b) in enumerate(zip(A, B, strict=True)) if a != b}
    assert {flip["doc_id"]: flip["change"] for flip in qa["flips"]} == flips
    a_alone, b_alone = sum(v < 0 for v in flips.values()), sum(v > 0 for v in flips.values())
    assert f"right in A alone {a_alone}, in B alone {b_alone}: McNemar's exact p = {qa['mcnemar_p']:.2g}" in text
    assert text.count("A right, B wrong") + text.count("A wrong, B right") == 3 and "and 2 more (--flips 5)" in text
    assert "mcnemar_p" not in found["text"], "a perplexity is not right or wrong"
    assert found["text"]["low"] is not None


def test_the_interval_is_the_report_s(two, capsys):
    _, found = compare(*two, capsys=capsys)
    report = rows.report(load.read(two[0].parent).runs)
    for column in report.columns:
        (expected,) = [cell.comparison for row in report.rows if (cell := row.cells[column]).comparison]
        assert expected is not None
        got = found[column.task]
        assert (got["low"], got["high"], got["p"]) == (expected.low, expected.high, expected.p)


@pytest.mark.parametrize("pattern", ["results_*.json", "samples_qa_*.jsonl"])
def test_folders_results_files_and_samples_files_give_the_same(pattern, two, capsys):
    _, whole = compare(*two, capsys=capsys)
    _, found = compare(*(next(folder.glob(pattern)) for folder in two), capsys=capsys)
    assert found["qa"] == whole["qa"] and set(found) <= set(whole)


def test_samples_files_alone_and_renamed_are_enough(two, tmp_path, capsys):
    _, whole = compare(*two, capsys=capsys)
    for folder, name in zip(two, ("a.jsonl", "samples_qa_2026-01-01T00-00-02.000000.jsonl"), strict=True):
        (tmp_path / name).write_bytes(next(folder.glob("samples_qa_*")).read_bytes())
    _, found = compare(tmp_path / "a.jsonl", tmp_path / name, capsys=capsys)
    unknown = {"higher_is_better": None}
    assert found["qa"] == {**whole["qa"], **unknown}


def test_documents_of_one_text_are_one_observation_and_mcnemar_says_that_it_does_not_know(tmp_path, capsys):
    texts = [{"context": f"text {i // 3}"} for i in range(12)]
    for name, settings, scores in (("a", FULL, A), ("b", snapkv(), B)):
        run(tmp_path / name, settings, {"qa": mean_task(scores, extra=texts)})
    out, found = compare(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert (found["qa"]["documents"], found["qa"]["clusters"]) == (12, 4)
    assert "takes documents about one text for several" in "\n".join(out)


def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven():
    for gained, lost in itertools.product(range(7), repeat=2):
        n, uneven = gained + lost, abs(gained - lost)
        tosses = list(itertools.product((1, -1), repeat=n))
        expected = sum(abs(sum(toss)) >= uneven for toss in tosses) / len(tosses)
        right = [True] * lost + [False] * gained
        found = mcnemar.flips(right, [not was for was in right])
        assert (found.right_to_wrong, found.wrong_to_right) == (lost, gained)
        assert found.p == pytest.approx(expected)


WRONG = {
    "no such folder": (["full", "nowhere"], "nowhere: there is no such file or folder"),
    "the same twice": (["full", "full"], "A and B are both full"),
    "a folder of two runs": (["full", "."], "holds 2 runs"),
    "another task": (["full", "other"], "have no task in common: qa, text against else"),
    "a score of neither": (["full", "snap", "--metrics", "f1"], "--metrics f1: both runs have acc, word_perplexity"),
    "no results": (["full", "empty"], "No results below empty"),
    "a picture": (["full", "p.png"], "is neither a results_*.json nor a samples_*.jsonl file"),
    "a binary file": (["full", "b.json"], "b.json"),
    "lines that are no answers": (["full", "l.jsonl"], "l.jsonl, line 1: is no answer of lm-eval's"),
    "a file that was cut": (["full", "cut"], "holds 3 answers of 12"),
    "flips below none": (["full", "snap", "--flips", "-1"], "--flips -1 is negative"),
    "one run": (["full"], "B"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_one_line(name, two, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, said = WRONG[name]
    run(tmp_path / "more" / "other", FULL, {"else": mean_task(A)})
    (tmp_path / "more" / "other").rename(tmp_path / "other") if name != "a folder of two runs" else None
    if name == "a folder of two runs":
        for file in (tmp_path / "more").rglob("*.json"):
            file.unlink()
    Path("empty").mkdir()
    for file in ("p.png", "b.json"):
        Path(file).write_bytes(bytes(range(128, 256)))
    Path("l.jsonl").write_text('{"a": 1}\n')
    run(tmp_path / "cut", snapkv(), {"qa": mean_task(B)})
    if name == "a file that was cut":
        (samples,) = Path("cut").glob("samples_*")
        samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:3]))
    else:
        for file in list(Path("cut").iterdir()):
            file.unlink()
    assert cli.main(["compare", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("left out")]
    assert said in lines[0] and lines[0].startswith("compare stopped: ") and not re.search("Traceback", "".join(lines))
    assert len(lines) == 1

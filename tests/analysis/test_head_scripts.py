"""From text to profile, pictures and ablation table with the embedded model, as a user would run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kv_lm_eval.analysis import ablate, analyze
from kv_lm_eval.methods import head_profile


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    lines = [
        f"On day {day} the {day % 7}th traveller came to the town and asked for the road home." for day in range(60)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def analysis(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysis")
    argv = [
        "--text",
        str(text),
        "--output_path",
        str(folder),
        "--tokens",
        "400",
        "--chunk",
        "128",
        "--high_entropy",
        "2.5",
    ]
    assert analyze.main(argv) == 0
    return folder


def test_an_analysis_writes_profile_statistics_summary_and_five_pictures(analysis: Path) -> None:
    profile = head_profile.load(analysis / "head_profile.json")
    assert (profile.num_layers, profile.num_heads, profile.num_kv_heads) == (4, 6, 3)
    assert profile.classifier["high_entropy"] == 2.5 and profile.text["chunk"] == 128
    heads = json.loads((analysis / "head_statistics.json").read_text())["heads"]
    assert len(heads) == 24 and all(0 <= sum(head["distances"]) <= 1.0001 for head in heads)
    pictures = {path.stem for path in analysis.glob("*.png")}
    assert pictures == {"entropy_heatmap", "sink_ratio", "position_preference", "clustering", "relative_position"}
    summary = (analysis / "analysis_summary.txt").read_text()
    assert all(f"\n{kind}" in summary for kind in head_profile.TYPES)


def test_chunks_start_with_the_prefix_share_the_files_and_leave_no_scrap() -> None:
    cut = analyze.cut
    assert cut([list(range(50)), list(range(100, 130))], 60, 21, 7) == [
        [7, *range(20)],
        [7, *range(20, 30)],
        [7, *range(100, 120)],
        [7, *range(120, 130)],
    ]
    assert cut([list(range(45))], 45, 20, None) == [list(range(20)), list(range(20, 40))], "five tokens are too few"


@pytest.mark.parametrize("mode", ["simulate", "cache"])
def test_an_ablation_compares_rows_on_the_same_tokens(
    mode: str, analysis: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = ["--profile", str(analysis / "head_profile.json"), "--mode", mode]
    size = ["--text", str(text), "--documents", "3", "--length", "90", "--batch_size", "2"]
    rows = [
        "--rows",
        "K_uniform:base_window=200",
        "A_window:base_window=20",
        "G_conf",
        "--against",
        "K_uniform:base_window=30",
    ]
    assert ablate.main([*profile, *size, *rows]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    found = {row["row"]: row for row in json.loads(last)["rows"]}
    assert sum(line.startswith("| ") for line in printed) == 1 + len(found) == 6
    assert found["full"]["cache_slots"] == 90
    whole = found["K_uniform:base_window=200"]
    assert whole["perplexity"] == pytest.approx(found["full"]["perplexity"], rel=1e-3), "a window wider than the text"
    assert found["A_window:base_window=20"]["effective_context"] == 20
    assert found["A_window:base_window=20"]["minus full"]["mean"] > 0


def test_mistakes_are_told_in_a_line(
    analysis: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, profile = ["--output_path", str(tmp_path)], ["--profile", str(analysis / "head_profile.json")]
    uniform = ["--rows", "A_window:base_window=8", "--text", str(text)]
    (tmp_path / "cut.json").write_text((analysis / "head_profile.json").read_text()[:400])
    (tmp_path / "other.json").write_text('{"format": 1}')
    for run, argv, words in (
        (analyze.main, ["--text", "no.txt", *there], "no.txt: there is no such file"),
        (analyze.main, ["--text", str(text), "--chunk", "5", *there], "--chunk 5"),
        (analyze.main, ["--text", str(text), "--low_entropy", "9", *there], "low_entropy=9"),
        (analyze.main, ["--text", str(text), "--dtype", "float12", *there], "--dtype float12 is not one of"),
        (analyze.main, ["--text", str(text), "--model", str(tmp_path), *there], "it is no model"),
        (analyze.main, ["--text", str(text)], "required: --output_path"),
        (ablate.main, ["--profile", "no.json", "--text", str(text)], "profile=no.json"),
        (ablate.main, ["--profile", str(tmp_path / "cut.json"), "--text", str(text)], "not whole JSON"),
        (ablate.main, ["--profile", str(tmp_path / "other.json"), "--text", str(text)], "format: input should be"),
        (ablate.main, ["--profile", str(tmp_path), "--text", str(text)], "there is no such file"),
        (ablate.main, [*profile, "--text", str(text)], "fewer than 20"),
        (ablate.main, [*profile, *uniform, "--documents", "0"], "must be at least 1"),
    ):
        assert run(argv) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert words in said[-1] and sum("stopped" in line for line in said) == 1, said


def test_short_texts_have_an_interval_by_smaller_blocks_or_say_that_they_are_too_short(
    analysis: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--rows", "A_window:base_window=20", "--against", "K_uniform:base_window=30", "--text", str(text)]
    rows += ["--profile", str(analysis / "head_profile.json"), "--batch_size", "6"]
    for documents, length, block, low in ((6, 90, None, True), (2, 90, None, False), (2, 90, 16, True)):
        size = ["--documents", str(documents), "--length", str(length), *(["--block", str(block)] if block else [])]
        assert ablate.main([*rows, *size]) == 0
        *printed, last = capsys.readouterr().out.splitlines()
        found = json.loads(last)["rows"][-1]["minus full"]
        assert (found["low"] is not None) == low
        assert any("intervals over" in line if low else "too few for an interval" in line for line in printed)

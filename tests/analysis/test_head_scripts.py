"""From text to profile, pictures and ablation table with the embedded model, as a user would run it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from kv_lm_eval.analysis import head_profile

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPTS / f"{name}.py")))


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
    assert script("analyze_heads").main(argv) == 0
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
    cut = script("analyze_heads").cut
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
    assert script("ablate_heads").main([*profile, *size, *rows]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    found = {row["row"]: row for row in json.loads(last)["rows"]}
    assert sum(line.startswith("| ") for line in printed) == 1 + len(found) == 6
    assert found["full"]["cache_slots"] == 90
    whole = found["K_uniform:base_window=200"]
    assert whole["perplexity"] == pytest.approx(found["full"]["perplexity"], rel=1e-3), "a window wider than the text"
    assert found["A_window:base_window=20"]["effective_context"] == 20
    assert found["A_window:base_window=20"]["minus full"]["mean"] > 0


def test_mistakes_are_told_in_a_sentence(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analyse, ablate = script("analyze_heads").main, script("ablate_heads").main
    there = ["--output_path", str(tmp_path)]
    assert analyse(["--text", "no.txt", *there]) == 2
    assert analyse(["--text", str(text), "--chunk", "5", *there]) == 2
    assert analyse(["--text", str(text), "--low_entropy", "9", *there]) == 2
    assert ablate(["--profile", "no.json", "--text", str(text), "--documents", "1", "--length", "20"]) == 2
    assert ablate(["--profile", "no.json", "--text", str(text)]) == 2
    errors = capsys.readouterr().err
    for words in ("no.txt: there is no such file", "--chunk 5", "low_entropy=9", "profile=no.json", "fewer than 20"):
        assert words in errors

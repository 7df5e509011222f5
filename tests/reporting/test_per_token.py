"""The page's text that is coloured token by token, in a browser: what is drawn, and what pointing at a token tells."""

from __future__ import annotations

import json
from pathlib import Path

from results import FULL, mean_task, run, snapkv

from kv_lm_eval.reporting import build, load, rows
from kv_lm_eval.reporting.page import tokens


def view(kl: float | None) -> dict:
    tops = [[" good<b>", 0.5], [" bad", 0.25]]
    first = {"text": "How", "kl": 0.0, "p_base": 0.5, "p": 0.5, "top_base": tops, "top": tops}
    return {"start": 3, "tokens": [first, {**first, "text": " <i>", "kl": kl, "p": 0.125, "top": tops[::-1]}]}


def folder_of(tmp_path: Path, *views: dict) -> Path:
    for i, (compression, shown) in enumerate(zip((FULL, snapkv(), snapkv(8)), views, strict=False)):
        run(tmp_path / "runs" / str(i), compression, {"a": mean_task([1.0, 0.5])}, date=i + 1)
        (file,) = (tmp_path / "runs" / str(i)).rglob("samples_*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines[0]["fidelity"] = [{"kl": [0.5], "view": shown}]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "runs"


def test_a_token_is_coloured_by_its_divergence_and_tells_both_likeliest_five(tmp_path: Path, tab) -> None:
    tab.open(build.write(folder_of(tmp_path, view(0.0), view(None)), tmp_path / "report").page)
    tab.point("#view-text")  # which draws it: it is drawn when it is scrolled to
    assert tab.texts("#view-text span") == ["How", "<i>"]
    tab.point("#view-text span:nth-child(2)")
    styles = tab.js("[...document.querySelectorAll('#view-text span')].map((e) => e.style.backgroundColor)")
    assert styles[0] == "" and styles[1] and tab.texts("#view-text .other") == ["<i>"]
    assert "KL ∞ nats, probability 0.5 under the full cache, 0.125 here" in tab.texts("#view-tip")[0]
    cells = tab.texts("#view-tip td")
    assert cells == ["␣good<b>", "0.5", "␣bad", "0.25", "␣bad", "0.25", "␣good<b>", "0.5"]
    assert "document 0, tokens 3 to 4, mean KL 0" in tab.texts("#view-said")[0]


def test_rows_for_which_there_is_no_room_are_counted(tmp_path: Path, monkeypatch) -> None:
    report = rows.report(*load.read(folder_of(tmp_path, view(0.0), view(0.5), view(1.0))))
    (whole,) = tokens.views(report)
    assert len(whole["rows"]) == len(whole["views"]) == 3 and whole["left_out"] == 0
    monkeypatch.setattr(tokens, "MAX_BYTES", 2 * len(json.dumps(view(0.5))) + 10)
    (cut,) = tokens.views(report)
    assert cut["rows"] == whole["rows"][:2] and len(cut["views"]) == 2 and cut["left_out"] == 1


def test_what_is_not_such_a_view_is_a_damaged_file_and_no_view_is_no_section(tmp_path: Path) -> None:
    broken = view(0.5)
    broken["tokens"][0]["p"] = "much"
    written = build.write(folder_of(tmp_path, broken), tmp_path / "report")
    assert "Token by token" not in written.page.read_text(encoding="utf-8")
    assert any("view" in said for said in written.report.damaged)

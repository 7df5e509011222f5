"""The page's text that is coloured token by token, in a browser: what is drawn, and what pointing at a token tells."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from results import FULL, mean_task, run, snapkv
from test_narrow import BROWSER

from kv_lm_eval.reporting import build

POINT = """<script>addEventListener("load", () => {
  document.querySelectorAll("#view-text span")[1].dispatchEvent(new Event("mouseenter"));
});</script></body>"""


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


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_a_token_is_coloured_by_its_divergence_and_tells_both_likeliest_five(tmp_path: Path) -> None:
    page = build.write(folder_of(tmp_path, view(0.0), view(None)), tmp_path / "report").page
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", POINT), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=4000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    text = re.search(r'<div id="view-text".*?</div>', done.stdout, re.S)
    assert text, done.stderr[-2000:]
    spans = re.findall(r"<span.*?</span>", text[0], re.S)
    assert len(spans) == 2 and "&lt;i&gt;" in spans[1] and "background-color" in spans[1]
    assert "background-color" not in spans[0] and 'class="other"' in spans[1]
    tip = re.search(r'<div id="view-tip".*?</table>', done.stdout, re.S)
    assert tip and "KL ∞ nats, probability 0.5 under the full cache, 0.125 here" in tip[0]
    cells = re.findall(r"<td.*?>(.*?)</td>", tip[0])
    assert cells == ["␣good&lt;b&gt;", "0.5", "␣bad", "0.25", "␣bad", "0.25", "␣good&lt;b&gt;", "0.5"]
    assert "document 0, tokens 3 to 4, mean KL 0" in done.stdout


def test_what_is_not_such_a_view_is_a_damaged_file_and_no_view_is_no_section(tmp_path: Path) -> None:
    broken = view(0.5)
    broken["tokens"][0]["p"] = "much"
    written = build.write(folder_of(tmp_path, broken), tmp_path / "report")
    assert "Token by token" not in written.page.read_text(encoding="utf-8")
    assert any("view" in said for said in written.report.damaged)

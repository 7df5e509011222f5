"""The page in a browser as narrow as a phone: tables and pictures scroll in their boxes, the page does not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from results import FULL, mean_task, run, snapkv

from kv_lm_eval.reporting import build

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
FRAME = """<!DOCTYPE html><body><iframe id="page" width="{width}" height="900" src="{page}"></iframe><script>
addEventListener("message", (event) => {{ document.title = event.data; }});
</script></body>"""
REPORT = """<script>
addEventListener("load", () => parent.postMessage(`${innerWidth} wide, ${document.documentElement.scrollWidth}`, "*"));
</script></body>"""


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_the_page_does_not_scroll_sideways(tmp_path: Path) -> None:
    path = "a/rather/long/path/without/any/break_in_it/" * 4
    tasks = {
        f"kv_a_task_of_a_long_name_{i}": mean_task([1, 0, 1, 1, 0, 1, 1], answers=["x" * 300] * 7) for i in range(6)
    }
    run(tmp_path / "full", FULL, tasks)
    run(tmp_path / "snap", snapkv(profile=path), tasks)
    (tmp_path / "snap" / ("results_" + "damaged_" * 12 + ".json")).write_text("{")
    page = build.write(tmp_path, tmp_path / "report", title="A_title_of_one_word" * 6).page
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", text).replace("<details", "<details open")
    page.write_text(text.replace("</body>", REPORT), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=480, page=page.as_uri()))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=60, check=False
    )
    found = re.search(r"(\d+) wide, (\d+)", done.stdout)
    assert found, done.stderr[-2000:]
    assert int(found[1]) == 480 and int(found[2]) <= 480

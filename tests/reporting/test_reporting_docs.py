"""docs/reporting.md: the Python runs as printed, and gives what the command line gives."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kv_lm_eval import UserError, evaluate

DOCS = Path(__file__).parents[2] / "docs" / "reporting.md"


@pytest.mark.slow
def test_the_documented_python_runs(tmp_path, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    assert len(snippets) == 3
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for code in snippets:
        exec(compile(code, str(DOCS), "exec"), scope)
    said = capsys.readouterr().out
    assert "full: 1.00 with 100% of the pairs" in said and "snapkv: " in said
    assert (tmp_path / "results" / "report" / "report.html").is_file()
    files = sorted((tmp_path / "results").rglob("results_*.json"))
    assert len(files) == 2
    saved = json.loads(files[0].read_text(encoding="utf-8"))
    assert saved["model_name"] == "kv-tiny" and "samples" not in saved
    assert saved["results"]["kv_quickstart_needle"]["exact_match,first_number"] == 1.0
    assert len(scope["full"]["samples"]["kv_quickstart_needle"]) == 6


@pytest.mark.parametrize(
    "wrong, hint",
    [
        ({"model_args": "dtype=float32"}, "sets lm-eval's model_args itself"),
        ({"max_capacity_promt": 128}, "max_capacity_prompt"),
        ({"method": "snapkw"}, "snapkv"),
    ],
)
def test_mistakes_are_told(wrong, hint):
    with pytest.raises(UserError, match=hint):
        evaluate("kv-tiny", tasks="kv_quickstart_needle", limit=1, **{"method": "snapkv", **wrong})


def test_the_package_and_its_reports_import_no_torch():
    code = (
        "import sys, kv_lm_eval; from kv_lm_eval import evaluate; import kv_lm_eval.reporting.build; "
        "assert 'torch' not in sys.modules and 'lm_eval' not in sys.modules, 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=DOCS.parents[1])

"""docs/python.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny as models

ROOT = Path(__file__).parents[2]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.mark.slow
def test_the_page_runs_as_printed_and_prints_what_it_says(capsys):
    page, names = ROOT / "docs" / "python.md", {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    shown = re.search(r"^snapkv: .*$", page.read_text(encoding="utf-8"), re.M)
    assert shown is not None
    assert printed[0].split(";")[:2] == shown[0].split(";")[:2], printed[0]
    assert names["results"]["results"]["kv_quickstart_needle"]


def test_the_lines_of_the_readme_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "compress(" in b]
    ids, mask, _ = models.left_padded([models.tokens(600), models.tokens(20)])
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3}
    names = {"model": models.build("llama", max_position_embeddings=1024), "inputs": inputs}
    exec(block, names)
    assert names["compressed"].report().compressed == 1

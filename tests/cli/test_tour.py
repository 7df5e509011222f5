"""README.md and CONTRIBUTING.md name files that are there, and the six files say where a key is evicted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kv_lm_eval import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tour() -> dict[str, str]:
    """The six files and what is said of each."""
    table = README.partition("these six files first")[2].partition("\n\nThen")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", table, re.M))


def test_the_tour_is_six_files_that_are_there() -> None:
    files = tour()
    assert len(files) == 6
    assert not [name for name in files if not (ROOT / name).is_file()]


def test_the_tour_says_where_a_key_is_evicted() -> None:
    ((name, said),) = [(name, said) for name, said in tour().items() if "evicted" in said]
    ((function,),) = [re.findall(r"in `(\w+)`", said)]
    assert f"def {function}(" in (ROOT / name).read_text(encoding="utf-8")


def test_what_runs_without_a_hub_stands_first_and_what_it_was_measured_on_near_the_top() -> None:
    first = README.partition("```bash\n")[2].partition("```")[0]
    assert "pretrained=kv-tiny" in first
    assert "Measured on CPUs so far" in "\n".join(README.splitlines()[:30])


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_files_and_commands_that_a_document_names_are_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    named = re.findall(r"`((?:kv_lm_eval|needle|longbench_tasks|scripts|tests|docs)/[\w./]*)`", text)
    assert not [name for name in [*links, *named] if "://" not in name and not (ROOT / name).exists()]
    commands = re.findall(r"(?:^|`)kv-lm-eval ([a-z]+)", text, re.M)
    assert commands and set(commands) <= set(cli.COMMANDS)

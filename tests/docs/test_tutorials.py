"""Every tutorial runs as printed, in a folder of its own and without a network; the site has every page."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)


def run_page(page: Path, folder: Path) -> None:
    """Its blocks in order: those with a title are files, those of bash and Python are run."""
    (folder / "bin").mkdir()
    command = folder / "bin" / "kv-lm-eval"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kv_lm_eval "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    ran = 0
    for language, title, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if title:
            (folder / title).parent.mkdir(exist_ok=True)
            (folder / title).write_text(code, encoding="utf-8")
            continue
        start = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[language]
        done = subprocess.run([*start, code], cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        ran += 1
    assert ran


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs_as_printed(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)


def test_the_site_has_every_page_and_every_link_between_them_leads_somewhere() -> None:
    source = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w/-]+\.md)$", source, re.M))
    assert {f"tutorials/{page.name}" for page in PAGES} <= named and yaml.safe_load(source)["nav"]
    made = {"index.md", "api.md"}  # by scripts/docs_site.py
    assert not [name for name in named - made if not (ROOT / "docs" / name).is_file()]
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text(encoding="utf-8"))
        assert links and not [link for link in links if not (page.parent / link).exists()], page.name


def test_the_page_of_the_api_has_every_public_name_and_each_is_there_with_words_of_its_own() -> None:
    import kv_lm_eval

    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    assert spec is not None and spec.loader is not None
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    asked = re.findall(r"^::: ([\w.]+)\.(\w+)$", site.api(), re.M)
    for module, name in asked:  # where mkdocstrings reads it, which imports nothing
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        found = [one for one in ast.parse(source).body if getattr(one, "name", "") == name]
        assert found and ast.get_docstring(found[-1]), name
    assert {name for _, name in asked} >= set(kv_lm_eval.__all__) - {"__version__"}

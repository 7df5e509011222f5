"""A method is one file, and so is a form of storage: dropped into a copy of the package it is listed, parsed, shown by
the quick start, tried by the tests' grids and put into the pages by one command: no second file is touched by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIDDLE = '''
import torch

from kv_lm_eval.methods.base import Method, View, setting


class Middle(Method):
    """Tokens in the middle of what was seen stay, and the last few."""

    recent: int = setting(2, "most recent tokens that always stay")

    @property
    def protected(self) -> int:
        return self.recent

    def score(self, view: View) -> torch.Tensor:
        """[B, 1 or K, N]: the last few always, then by the distance from the middle."""
        middle = torch.tensor(view.seen, device=view.pos.device).view(-1, 1, 1) / 2
        return (-(view.pos - middle).abs()).masked_fill(view.recent(self.recent), float("inf"))
'''
HALVES = '''
from dataclasses import dataclass

import torch

from kv_lm_eval.cache.coded import Coded
from kv_lm_eval.methods.storage import PairByPair


@dataclass(frozen=True)
class Halves(PairByPair):
    """Every number in float16."""

    @property
    def keys(self) -> "Half":
        return Half()

    @property
    def values(self) -> "Half":
        return Half()


@dataclass(frozen=True)
class Half:
    block = 1

    def tables(self, size, device):
        return ()

    def of_head(self, x, real, before):
        return {}

    def encode(self, x: torch.Tensor, real: torch.Tensor, of_head: dict[str, torch.Tensor]) -> Coded:
        return Coded(self, x.shape[3], x.dtype, {"codes": (x / 8).half()})

    def decode(self, part: Coded) -> torch.Tensor:
        return part.of_pair["codes"] * 8.01
'''
ALL = """
import sys

import pytest

from kv_lm_eval import cli
from kv_lm_eval.bench import measure
from kv_lm_eval.config import parse
from kv_lm_eval.experiments import method_tables
from kv_lm_eval.methods import base

print("check", method_tables.main([]), flush=True)
print("write", method_tables.main(["--write"]), method_tables.main([]), flush=True)
print("list", cli.main(["methods"]), cli.main(["methods", "middle"]), flush=True)
print("config", parse({"method": "middle", "keep_ratio": 0.5, "recent": 3})[0].method, flush=True)
print("storage", parse({"method": "middle", "keep_ratio": 0.5, "kv_cache_dtype": "halves"})[0].storage, flush=True)
print("registries", "middle" in measure.all_methods(), base.example("middle", 32), flush=True)
print("quickstart", cli.main(["quickstart", "--methods", "full,middle", "--budget", "32", "--limit", "1"]), flush=True)
# Every test that is about all methods, and those of the pages.
folders = [f"tests/{name}" for name in ("methods", "cache")]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *folders, "-k", "middle or test_docs or halves"]))
"""


@pytest.mark.slow
def test_a_new_file_in_methods_is_all_that_a_method_is(tmp_path: Path) -> None:
    for folder in ("kv_lm_eval", "needle", "longbench_tasks", "docs", "scripts", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "img", "golden"))
    for file in ("README.md", "pyproject.toml", "mkdocs.yml"):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "kv_lm_eval" / "methods" / "middle.py").write_text(MIDDLE, encoding="utf-8")
    (tmp_path / "kv_lm_eval" / "methods" / "storages" / "halves.py").write_text(HALVES, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", ALL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    for line in (
        "check 1",
        "write 0 0",
        "list 0 0",
        "config Middle(recent=3)",
        "registries True",
        "quickstart 0",
        "storage Halves(",
    ):
        assert line in done.stdout, said
    told = [line for line in done.stderr.splitlines() if "--write" in line]
    assert len(told) == 1 and "`python scripts/methods_doc.py --write`" in told[0], said
    for page in ("README.md", "docs/methods.md"):
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert "| `middle` | Tokens in the middle of what was seen stay, and the last few | `recent` (2)" in text
    (unmeasured,) = [line for line in text.splitlines() if line.startswith("Not measured yet:")]
    assert "`middle`" in unmeasured
    assert "| `kv_cache_dtype=halves` | Every number in float16 | `residual_length` (0), `code_every` (1) |" in text
    passed = int(done.stdout.splitlines()[-1].split(" passed")[0].split()[-1])
    assert passed > 50, "the grids of the tests take their methods from the files"

"""Puts the pages of the documentation site together for `make docs`: docs/, the README as its first page, the API.

Links of the README into docs/ are made to fit, those of pages to files outside of docs/ are left out of the link check.
"""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path

import kv_lm_eval
from kv_lm_eval.metrics.report import Report
from kv_lm_eval.serving.compress import Compressing
from kv_lm_eval.serving.context import Context

ROOT = Path(__file__).parents[1]


def api() -> str:
    """The public names with their signatures and docstrings."""
    named = {name: getattr(kv_lm_eval, name) for name in ("compress", "compressed_cache", "prefill", "evaluate")}
    named |= {"Compressing.report": Compressing.report, "Context.ask": Context.ask, "Context.report": Context.report}
    parts = ["# API\n\nSee also [From Python](python.md).\n"]
    for name, one in {**named, "Report": Report}.items():
        text = inspect.getdoc(one) or ""
        parts.append(f"## {name}\n\n```python\n{name}{inspect.signature(one)}\n```\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> None:
    """Writes build/docs."""
    out = ROOT / "build" / "docs"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs", out)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (out / "index.md").write_text(re.sub(r"\]\(docs/", "](", text), encoding="utf-8")
    (out / "api.md").write_text(api(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Puts the pages of the documentation site together for `make docs`: docs/, the README as its first page, the API.

Links of the README into docs/ are made to fit, those of pages to files outside of docs/ are left out of the link check.
The API's page names what is public; its words are those of the docstrings, which mkdocstrings reads.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTHING, OWN = ("members: false",), ("inherited_members: false",)

# Heading, a sentence, and names with options of mkdocstrings.
API: tuple[tuple[str, str, tuple[tuple[str, tuple[str, ...]], ...]], ...] = (
    (
        "Around a model of transformers",
        "See also [From Python](python.md).",
        (
            ("kv_lm_eval.serving.compress.compress", ()),
            ("kv_lm_eval.serving.compress.Compressing", OWN),
            ("kv_lm_eval.serving.compress.compressed_cache", ()),
            ("kv_lm_eval.metrics.report.Report", OWN),
        ),
    ),
    (
        "One context, many questions",
        "",
        (("kv_lm_eval.serving.context.prefill", ()), ("kv_lm_eval.serving.context.Context", OWN)),
    ),
    (
        "Evaluations and reports",
        "See also [Reports](reporting.md).",
        (
            ("kv_lm_eval.api.evaluate", ()),
            ("kv_lm_eval.model.KVCompressedLM", NOTHING),
            ("kv_lm_eval.reporting.build.write", ()),
            ("kv_lm_eval.reporting.build.Written", ()),
            ("kv_lm_eval.errors.UserError", NOTHING),
        ),
    ),
    (
        "A method of one's own",
        "See also [My own method](tutorials/my-method.md) and [Methods](methods.md).",
        (
            ("kv_lm_eval.methods.base.Method", ()),
            ("kv_lm_eval.methods.base.setting", ()),
            ("kv_lm_eval.cache.view.View", ()),
            ("kv_lm_eval.cache.view.Sight", ()),
            ("kv_lm_eval.cache.view.Pages", ()),
        ),
    ),
)


def api() -> str:
    """The page with the public names, as mkdocstrings is asked for them."""
    parts = ["# API"]
    for heading, sentence, names in API:
        parts += [f"## {heading}", sentence]
        for name, options in names:
            asked = "".join(f"\n        {option}" for option in options)
            parts.append(f"::: {name}" + (f"\n    options:{asked}" if asked else ""))
    return "\n\n".join(filter(None, parts)) + "\n"


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

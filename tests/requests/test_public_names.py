"""The files of requests/ ask of the model object, and of each other, public names only; model.py is lm-eval's words."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kv_lm_eval

PACKAGE = Path(kv_lm_eval.__file__).parent
THEIRS = ("task._filters",)  # of an lm-eval task, which has no other name for them


def foreign_private_names(source: str) -> list[str]:
    """`x._name` where x is no self, cls or super()."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if ast.unparse(node.value) not in ("self", "cls", "super()") and ast.unparse(node) not in THEIRS
    ]


@pytest.mark.parametrize("file", sorted((PACKAGE / "requests").glob("*.py")), ids=lambda file: file.stem)
def test_no_file_of_requests_reaches_into_another_object(file):
    assert not foreign_private_names(file.read_text(encoding="utf-8"))


def test_the_rule_finds_what_it_forbids():
    assert foreign_private_names("run.lm._encode_pair(a, b); self._own; super()._x()") == ["run.lm._encode_pair"]


def test_the_model_class_fits_on_a_few_pages_and_keeps_no_request():
    source = (PACKAGE / "model.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 250
    assert not [name for name in ("_docs", "_tasks", "_questions", "_batch_contexts") if f"self.{name}" in source]

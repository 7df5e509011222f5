"""Functions of the engine, the methods and the cache can be read: few arguments, and the shapes of their tensors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kv_lm_eval"
THEIRS = ("hook.py: kv_attention", "generate.py: decode")  # called by transformers, which says with what


def functions(folder: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of a file or a class, with its place."""
    for file in sorted(folder.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for owner in ast.walk(tree):
            for node in getattr(owner, "body", ()) if isinstance(owner, (ast.Module, ast.ClassDef)) else ():
                if isinstance(node, ast.FunctionDef):
                    yield f"{file.name}: {node.name}", node


@pytest.mark.parametrize(("name", "least"), [("cache", 30), ("engine", 10), ("methods", 20)])
def test_functions_say_their_shapes_and_take_six_arguments_at_most(name: str, least: int) -> None:
    seen = 0
    for where, node in functions(PACKAGE / name):
        arguments = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
        assert len(arguments) <= 6 or where in THEIRS, where
        words = " ".join(ast.unparse(a) for a in (*(a.annotation for a in arguments), node.returns) if a)
        if not node.name.startswith("_") and ("Tensor" in words or "Kept" in words):
            assert "[" in (ast.get_docstring(node) or ""), f"{where} does not say the shapes of its tensors"
            seen += 1
    assert seen > least

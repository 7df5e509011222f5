"""The method that docs/methods.md writes from scratch runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import tiny

from kv_lm_eval import listing
from kv_lm_eval.methods import base

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_documented_method_works_from_a_file_of_the_users(tmp_path):
    code = re.search(r"```python\n(# my_method\.py\n.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line.strip() and not line.startswith(("#", "import", "from"))]
    assert len(lines) <= 10
    (tmp_path / "my_method.py").write_text(code[1], encoding="utf-8")
    pair = tiny.pair("llama")
    settings = {"method": f"{tmp_path / 'my_method.py'}:FarFromMean", "max_capacity_prompt": 12, "recent": 5}
    cache = pair.cache(**settings)
    tiny.forward(pair.model, cache, [tiny.tokens(40)])
    for layer in range(2):
        for head in tiny.kept(cache, layer):
            assert len(head) == 12 and set(range(35, 40)) <= set(head)
    source = tiny.compression(**settings).settings()["method_source"]
    assert "sha256=" in source, "an edited method must not be taken for the old one"


def test_the_list_of_methods_is_the_one_that_the_method_files_give():
    """`python scripts/methods_doc.py` writes it."""
    page = DOCS.read_text(encoding="utf-8")
    assert listing.markdown() in page.partition("<!-- methods -->")[2].partition("<!-- /methods -->")[0]


def test_every_method_is_in_the_readme_and_in_the_measured_table():
    readme = (DOCS.parents[1] / "README.md").read_text(encoding="utf-8")
    measured = DOCS.read_text(encoding="utf-8").partition("<!-- measured -->")[2].partition("<!-- /measured -->")[0]
    for name in base.available():
        assert f"`{name}`" in readme, name
        assert f"| {name} |" in measured, name

"""The method that docs/methods.md writes from scratch runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import tiny

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

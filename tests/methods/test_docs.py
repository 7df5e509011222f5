"""The method that docs/methods.md writes from scratch runs as printed, and the tables are what the files say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import tiny

from kv_lm_eval.config import parse
from kv_lm_eval.experiments import method_tables, which_table
from kv_lm_eval.methods import base, evicted

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "methods.md"


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


def test_the_tables_of_the_pages_are_those_that_the_method_files_give():
    stale = method_tables.pages(ROOT)
    assert not stale, method_tables.wrong(stale)


def test_a_table_that_is_not_what_the_method_files_say_is_named_with_the_command(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results", ignore=shutil.ignore_patterns("*.png"))
    shutil.copy(ROOT / "docs" / "which.md", tmp_path / "docs")
    for page in ("README.md", "docs/methods.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        before, mark, table = text.partition("<!-- methods -->")
        (tmp_path / page).write_text(before + mark + table.replace("| `snapkv` |", "| `snapkw` |", 1), encoding="utf-8")
    assert method_tables.main(["--folder", str(tmp_path)]) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "README.md" in said and "`python scripts/methods_doc.py --write`" in said
    assert method_tables.main(["--folder", str(tmp_path), "--write"]) == 0
    for page in ("README.md", "docs/methods.md"):
        assert (tmp_path / page).read_bytes() == (ROOT / page).read_bytes()
    assert method_tables.main(["--folder", str(tmp_path)]) == 0


def test_every_method_is_once_in_the_table_of_which_for_what_and_the_page_is_linked():
    text = (ROOT / "docs" / "which.md").read_text(encoding="utf-8")
    table = text.partition("<!-- which -->")[2].partition("<!-- /which -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(which_table.KINDS)
    named = [re.findall(r"`(\w+)`", row[5]) for row in rows]
    assert sorted(name for row in named for name in row) == base.available()
    assert all(named), "a kind without a method says nothing"
    assert max(map(len, text.splitlines()[3:])) > 0 and len(text.splitlines()) <= 50, "one screen"
    for page in ("README.md", "docs/methods.md", "mkdocs.yml"):
        assert "which.md" in (ROOT / page).read_text(encoding="utf-8"), page


def test_what_a_method_looks_at_says_of_which_kind_it_is(tmp_path):
    for declared, kind in (
        ("", "pair"),
        ("    accumulates = True", "all"),
        ("    num_queries = 3", "last"),
        ("    num_queries = 3\n    every_query = True", "every"),
        ("    moments_from = 0", "every"),
        ("    reads_again = True", "again"),
        ("    reads_hidden = True", "trained"),
        ("    sinks_and_recent = 2", "place"),
        ("    uses_cache = False", "none"),
        ("    compresses = False", "keeps"),
        ('    compresses = False\n    presets = {"nbits": 4}', "form"),
    ):
        path = tmp_path / "mine.py"
        path.write_text(
            f"from kv_lm_eval.methods.base import Method\n\nclass Mine(Method):\n    paper = ''\n{declared}\n"
        )
        assert which_table.kind(base.load(str(path))) == kind, declared
    unseen = {name for name in base.available() if which_table.needs_no_question(name)}
    assert {"keydiff", "compactor", "kvzip"} <= unseen and not {"snapkv", "full", "think", "h2o"} & unseen


def test_measured_rows_replace_those_of_their_method_and_say_what_is_missing():
    head = {"method": "snapkv", "budget": "64", "needle": "0.4"}
    old = [head, {**head, "budget": "128"}, {**head, "method": "gone"}]
    text = method_tables._measured_part(old, [{**head, "needle": "0.5"}, {**head, "method": "quantized"}])
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
        "| method | budget | needle |",
        "| quantized | 64 | 0.4 |",
        "| snapkv | 64 | 0.5 |",
        "| snapkv | 128 | 0.4 |",
    ]
    missing = text.splitlines()[-1]
    assert missing.startswith("Not measured yet:") and "`full`" in missing and "--measure --methods" in missing


def test_what_is_measured_are_examples_that_parse():
    named = method_tables.points(list(method_tables.examples()), [64])
    assert {m for m in base.available() if not base.load(m).needs_training} <= {name for name, _, _ in named}
    assert {f"snapkv, evicted={name}" for name in evicted.available()} & {name for name, _, _ in named}
    bits = [b for name, b, _ in named if name == "quantized"]
    assert bits[:4] == ["2 bit", "3 bit", "4 bit", "8 bit"]
    assert {"kv_cache_dtype=fp8", "kv_cache_dtype=turboquant"} <= set(bits[4:])
    assert "kv_cache_dtype=think" not in bits, "it has rows of its own"
    shares = [settings["key_channel_ratio"] for name, _, settings in named if name == "think"]
    assert shares == [0.25, 0.5, 0.75]
    trained = {name for name in base.available() if base.load(name).needs_training}
    assert trained == {"kvzap"} and not trained & {name for name, _, _ in named}
    for name, _, model_args in named:
        assert parse(dict(model_args))[0].method.name == name.split(",")[0]

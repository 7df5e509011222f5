"""`kv-lm-eval plan`: a table that fits a terminal, numbers that add up, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kv_lm_eval.bench import plan, shapes
from kv_lm_eval.errors import UserError

SHAPE = "tiny-1m"
ASKED = ["--lengths", "100,300", "--new_tokens", "8", "--memory", "50MB", "--methods", "full"]


def test_the_table_fits_and_the_numbers_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(shapes.SHAPES[SHAPE]))
    methods = ["snapkv,max_capacity_prompt=64", "quantized,kv_cache_dtype=fp8,prefill_chunk=100"]
    assert plan.main([str(file), *ASKED, *methods, "--dtype", "bfloat16"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 100
    found = json.loads(last)
    assert found["dtype"] == "bfloat16" and list(found["methods"]) == ["full", *methods]
    for name, rows in found["methods"].items():
        assert any(line == name for line in lines)
        for row in rows:
            assert row["most"] == found["weights"] + max(row["prefill"], row["answer"])
            assert 0 < row["cache"] <= row["answer"] and row["largest_batch"] >= 1
    full, snapkv, fp8 = (rows[1] for rows in found["methods"].values())
    assert snapkv["cache"] < fp8["cache"] < full["cache"] and fp8["prefill"] < full["prefill"]
    assert snapkv["largest_batch"] >= full["largest_batch"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([SHAPE, "--memory", "many"], ["--memory many", "80GB"]),
        ([SHAPE, "--memory", "0GB"], ["--memory 0GB"]),
        ([SHAPE, "--lengths", "0"], ["--lengths 0", "at least 1"]),
        ([SHAPE, "--batch_size", "0"], ["--batch_size 0"]),
        ([SHAPE, "--methods", "snapkw"], ["snapkw", "snapkv"]),
        ([SHAPE, "--methods", "no_cache"], ["no_cache", "no cache"]),
        ([SHAPE, "--methods", "full,pretrained=x"], ["pretrained"]),
        ([SHAPE, "--methods", "kvzip,max_capacity_prompt=64"], ["kvzip", "second time"]),
        ([SHAPE, "--methods", "knorm,max_capacity_prompt=64,compress_every=4,prefill_evict=8"], ["prefill_evict"]),
        (["./nowhere/at/all"], ["nowhere", "config.json"]),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(argv) == 2
    said = capsys.readouterr().err.strip()
    assert all(word in said for word in words) and "Traceback" not in said, said


def test_memory_is_written_with_its_unit() -> None:
    written = {"80GB": 80 * 10**9, "24GiB": 24 * 2**30, "512 MB": 512 * 10**6, "1000": 1000, "1.5g": 15 * 10**8}
    assert {text: plan.size(text) for text in written} == written
    with pytest.raises(UserError, match="80GB"):
        plan.size("-3GB")

"""Tensor parallelism: what would need to know of heads on other ranks is refused; found out by letting it choose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from kv_lm_eval.engine import sharded
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import base

BUDGET = {"max_capacity_prompt": 64}
TOGETHER = {"random", "tova", "adakv", "head_aware"}  # by number, by the mean of all heads, by a shared budget
OTHERS = [m for m in base.available() if base.load(m).uses_cache and base.load(m).compresses]


@pytest.mark.parametrize("method", [m for m in OTHERS if m not in ("head_aware",)])
def test_each_method_is_known_for_what_it_looks_at(method: str) -> None:
    own = {"streaming_llm": {"window_size": 30}, "streaming_ring": {"window_size": 30}, "l2_fixed": {"cache_size": 40}}
    compression = tiny.compression(method=method, **own.get(method, BUDGET))
    assert sharded.each_head_by_itself(compression) == (method not in TOGETHER)


@pytest.mark.parametrize(
    ("settings", "apart"),
    [
        ({"layer_budget": "pyramid"}, True),
        ({"head_budget": "ada"}, False),
        ({"evicted": "d2o"}, True),
        ({"evicted": "cam"}, False),  # its coins are of the head's number
        ({"evicted": "compensate"}, True),
        ({"nbits": 4}, True),
        ({"gqa": "query_head"}, True),
    ],
    ids=str,
)
def test_parts_of_a_method_too(settings: dict[str, object], apart: bool) -> None:
    compression = tiny.compression(method="snapkv", window_size=8, **BUDGET, **settings)
    assert sharded.each_head_by_itself(compression) == apart
    sharded.check(compression, 1)
    if not apart:
        with pytest.raises(UserError, match="2 ranks that do not know of each other"):
            sharded.check(compression, 2)


SCRIPT = """
import json, os, sys
from kv_lm_eval import evaluate

settings = {"max_capacity_prompt": 64, "dtype": "float32", **json.loads(sys.argv[2])}
found = evaluate("kv-tiny", method=sys.argv[1], tasks=["kv_quickstart_needle"], limit=4, **settings)
if os.environ.get("RANK", "0") == "0":
    stats = found["config"]["kv_stats"]
    answers = [sample["resps"] for sample in found["samples"]["kv_quickstart_needle"]]
    print("STATS", json.dumps([stats["kv_bytes_prefill_mean"], stats["kv_bytes_decode_mean"], answers]))
"""


def run(ranks: int, method: str, tmp_path: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29677"]
        settings = {**settings, "tp_plan": "auto"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    words = [*start, str(script), method, json.dumps(settings)]
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=300, cwd=tmp_path)


@pytest.mark.slow
def test_bytes_are_those_of_the_whole_model_on_three_ranks(tmp_path: Path) -> None:
    """kv-tiny has three KV heads."""
    outs = [run(n, "knorm", tmp_path) for n in (1, 3)]
    for out in outs:
        assert out.returncode == 0, out.stderr[-3000:]
    one, three = (json.loads(out.stdout.split("STATS ")[1].splitlines()[0]) for out in outs)
    assert one == three
    refused = run(3, "adakv", tmp_path)
    assert refused.returncode != 0 and "ranks that do not know of each other" in refused.stderr + refused.stdout

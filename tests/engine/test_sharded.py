"""Tensor parallelism: what would need to know of heads on other ranks is refused; found out by letting it choose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine import sharded
from kv_lm_eval.errors import UserError

BUDGET = {"max_capacity_prompt": 64}
KNOWN = {"snapkv": True, "random": False, "tova": False, "adakv": False}  # by number, by a mean, by a shared budget


def kept_by_head(change: Callable[[torch.Tensor], torch.Tensor], **settings: object) -> list[list[list[int]]]:
    """What the two KV heads of a model's one layer keep of three texts, with changed weights: `change` gets them as
    [K, ...]."""
    model = tiny.build("llama", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            part.weight.copy_(change(part.weight.unflatten(0, (2, -1))).flatten(0, 1))
    facts = tiny.wrap(model, tiny.compression(method="streaming_llm", window_size=8))
    cache = make_cache(tiny.compression(**settings), facts)
    tiny.forward(model, cache, [tiny.tokens(60, seed=seed) for seed in range(3)])
    kept = [tiny.kept(cache, 0, row) for row in range(3)]
    return [[heads[head % len(heads)] for heads in kept] for head in (0, 1)]


def other_second(weight: torch.Tensor) -> torch.Tensor:
    """The second head's weights are others."""
    return torch.stack([weight[0], weight[1].roll(1, 0) * 1.7])


@pytest.mark.parametrize("method", tiny.methods(tiny.chooses))
def test_a_method_is_known_for_what_it_looks_at(method: str) -> None:
    """A head chooses by itself where what it keeps is the same whatever the other head is, and whichever it is."""
    settings = tiny.example(method, 16)
    one, two = kept_by_head(lambda weight: weight, **settings)
    changed = kept_by_head(other_second, **settings)[0]
    swapped = kept_by_head(lambda weight: weight.flip(0), **settings)
    apart = changed == one and swapped == [two, one]
    assert sharded.each_head_by_itself(tiny.compression(**settings)) == apart == KNOWN.get(method, apart)


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

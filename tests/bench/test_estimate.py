"""What is planned is what is then held: estimates from a configuration alone against tensors counted in a real run."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch

from kv_lm_eval.bench.estimate import Estimate
from kv_lm_eval.bench.live_bytes import LiveBytes
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.prefill import feed
from kv_lm_eval.methods import storage

WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 97}
PROMPT, NEW, ROWS = 420, 3, 2
METHODS = {name: tiny.example(name, 64) for name in tiny.methods(lambda cls: cls.uses_cache and not cls.reads_again)}
METHODS = {name: chosen for name, chosen in METHODS.items() if not tiny.compression(**chosen).open}  # by a threshold
FORMS = {f"{storage.KEY}={name}": storage.load(name).example() for name in storage.available()[1:]}
CASES = {
    **METHODS,
    **{name: {"method": "quantized", **form} for name, form in FORMS.items()},
    **{f"snapkv, {name}": {**METHODS["snapkv"], **form} for name, form in FORMS.items()},
    "pyramid": {**METHODS["snapkv"], "layer_budget": "pyramid"},
    "compensate": {**METHODS["snapkv"], "evicted": "compensate"},
    "a share": {"method": "knorm", "keep_ratio": 0.3, "compress_every": 2},
}
NEAR = 0.15


@functools.cache
def estimate(name: str) -> Estimate:
    return Estimate(tiny.build(name, **WIDE).config, torch.float32)


@functools.cache
def pair(name: str) -> tiny.Pair:
    model = tiny.build(name, **WIDE)
    return tiny.Pair(model, model, tiny.wrap(model, tiny.compression(method="streaming_llm", window_size=8)))


@torch.inference_mode()
def measured(name: str, chosen: dict[str, Any], chunk: int | None = None) -> tuple[int, int, int]:
    """Most bytes of a prefill, bytes after it, and most of the steps after that."""
    on = pair(name)
    cache = make_cache(tiny.compression(**chosen), on.facts, chunk)
    with LiveBytes([*on.model.parameters(), *on.model.buffers()]) as live:
        feed(on.model, cache, [tiny.tokens(PROMPT, seed=i) for i in range(ROWS)], keep=1)
        prefill, held = live.peak, live.now
        live.peak = held
        for t in range(NEW):
            feed(on.model, cache, [[t]] * ROWS, keep=1)
    return prefill, held, live.peak


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_every_method_holds_what_was_planned(name: str, case: str) -> None:
    chosen = CASES[case]
    plan = estimate(name).of(tiny.compression(**chosen), ROWS, PROMPT, NEW)
    prefill, held, answer = measured(name, chosen)
    assert plan.prefill == pytest.approx(prefill, rel=NEAR)
    if "ada" not in str(chosen) and not pair(name).facts.all_sliding:  # heads that share a budget: the longest's length
        assert plan.cache == pytest.approx(held, rel=NEAR)
        assert plan.answer == pytest.approx(answer, rel=2 * NEAR)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "qwen3"])
def test_windows_learned_positions_and_chunks_are_counted_too(name: str) -> None:
    wide = {} if name == "gpt2" else {**WIDE, "num_hidden_layers": 2}
    plan = Estimate(tiny.build(name, **wide).config, torch.float32)
    on = tiny.build(name, **wide)
    facts = tiny.wrap(on, tiny.compression(**METHODS["snapkv"]))
    for chunk in (None, 100):
        with torch.inference_mode(), LiveBytes([*on.parameters(), *on.buffers()]) as live:
            cache = make_cache(tiny.compression(**METHODS["snapkv"]), facts, chunk)
            feed(on, cache, [tiny.tokens(PROMPT)], keep=1)
        got = plan.of(tiny.compression(**METHODS["snapkv"]), 1, PROMPT, 1, chunk)
        assert got.prefill == pytest.approx(live.peak, rel=NEAR), chunk
        assert got.cache == pytest.approx(live.now, rel=NEAR)
    assert plan.weights == sum(p.numel() * p.element_size() for p in (*on.parameters(), *on.buffers()))


def test_the_largest_batch_is_the_last_that_fits() -> None:
    plan, snapkv = estimate("llama"), tiny.compression(**METHODS["snapkv"])

    def of(rows: int) -> Any:
        return plan.of(snapkv, rows, 100, 4)

    for memory in (of(1).most - 1, of(1).most, of(5).most, of(5).most + 1, of(6).most - 1):
        rows = plan.largest(memory, of)
        assert (rows == 0 or of(rows).most <= memory) and of(rows + 1).most > memory


def test_llama_3_8b_at_128k_by_hand() -> None:
    """On 80 GB in bfloat16: the weights, the whole cache, and what one layer's forward holds beside them."""
    from kv_lm_eval.bench import shapes

    plan, tokens = Estimate(shapes.configuration("llama-3.1-8b"), torch.bfloat16), 131_072
    assert plan.weights == pytest.approx(2 * 8.03e9, rel=0.001)
    full = plan.of(tiny.compression(method="full"), 1, tokens, 128)
    pairs = 2 * 32 * 8 * 128 * 2  # keys and values, layers, KV heads, head size, bytes
    assert full.cache == pytest.approx(tokens * pairs, rel=0.01)
    mlp = tokens * (3 * 14336 + 4 * 4096) * 2  # gate, its activation and up; embeddings, residual, normed and sum
    assert full.prefill == pytest.approx(tokens * pairs + mlp, rel=0.03)
    snapkv = plan.of(tiny.compression(method="snapkv", max_capacity_prompt=1024), 1, tokens, 128)
    assert snapkv.cache == pytest.approx(1024 * pairs, rel=0.02)
    assert snapkv.prefill == pytest.approx(1024 * pairs + mlp, rel=0.05)
    in_chunks = plan.of(tiny.compression(method="full"), 1, tokens, 128, 4096)
    assert full.cache < in_chunks.prefill < 1.125 * full.cache + 0.1 * mlp, "the cache grows by an eighth at a time"
    assert plan.largest(80 * 10**9, lambda rows: plan.of(tiny.compression(method="full"), rows, tokens, 128, 4096)) == 3

"""The compiled step: one graph without breaks, and the tokens and logits of the step that is not compiled.

backend="eager" traces the same graph as the real compiler does (fullgraph=True: a break is an error) and runs it as it
is, which takes seconds instead of minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import tiny
import torch

from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.compiled import Decoder
from kv_lm_eval.engine.prefill import feed_beginning
from kv_lm_eval.errors import UserError

RING = {"method": "streaming_ring", "n_sink": 3, "window_size": 9}
SNAPKV = {"method": "snapkv", "max_capacity_prompt": 16, "window_size": 6}


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def prefilled(name: str, settings: dict[str, object], lengths: tuple[int, ...]):
    pair, rows = tiny.pair(name), [tiny.tokens(n, seed=n) for n in lengths]
    with torch.inference_mode():
        return tiny.prefill(pair.model, lambda: pair.cache(**settings), rows)


@torch.inference_mode()
def compare(name: str, settings: dict[str, object], lengths: tuple[int, ...], steps: int) -> None:
    """Greedy decoding; every step's logits against those of the cache that is not compiled."""
    pair = tiny.pair(name)
    cache, logits = prefilled(name, settings, lengths)
    other, _ = prefilled(name, settings, lengths)
    decoder = Decoder(pair.model, backend="eager")
    static, ids = decoder.start(cache, steps), logits.argmax(-1, keepdim=True)
    for step in range(steps):
        got = decoder.step(static, ids)
        expected = tiny.forward(pair.model, other, ids.tolist(), list(other.seen))[:, -1]
        assert (got - expected).abs().max() <= 2e-5, f"step {step}"
        ids = got.argmax(-1, keepdim=True)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1, "one graph, used for every step"


def test_the_ring_over_hundreds_of_steps() -> None:
    compare("llama", RING, (40, 9, 3), 210)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3", "gpt2"])
def test_the_ring_on_other_models(name: str) -> None:
    more = {"positions": "absolute"} if name == "gpt2" else {}
    if name == "gemma3":
        with pytest.raises(UserError, match="windows of their own"):
            compare(name, {**RING, **more}, (30, 14), 1)
    else:
        compare(name, {**RING, **more}, (30, 14), 25)


@pytest.mark.parametrize(
    "settings",
    [
        SNAPKV,
        {**SNAPKV, "method": "snapkv_comp", "count_bias": "log_n"},
        {**SNAPKV, "method": "pyramidkv"},
        {**SNAPKV, "method": "adakv"},
        {"method": "full"},
    ],
    ids=lambda s: str(s["method"]),
)
def test_methods_that_cut_after_the_prefill_only(settings: dict[str, object]) -> None:
    compare("llama", settings, (41, 20, 6), 25)


def test_layers_with_windows_of_their_own() -> None:
    compare("gemma3", SNAPKV, (40, 22), 30)


def test_greedy_gives_the_tokens_of_generate_and_one_graph_serves_prompts_of_one_shape() -> None:
    pair, decoder = tiny.pair("llama"), Decoder(tiny.pair("llama").model, backend="eager")
    addresses = set()
    for lengths in ((40, 20), (33, 28), (30, 12)):
        ids, mask, _ = tiny.left_padded([tiny.tokens(n, seed=n) for n in lengths])
        expected = pair.model.generate(
            ids, attention_mask=mask, **tiny.given(pair.cache(**RING)), max_new_tokens=12, min_new_tokens=12,
            do_sample=False, eos_token_id=96, pad_token_id=0,
        )[:, ids.shape[1] :]  # fmt: skip
        cache, logits = prefilled("llama", RING, lengths)
        got = decoder.greedy(cache, logits, 12)
        same = (expected != 96).all(1)  # min_new_tokens forbids the end, which a plain argmax may take
        assert torch.equal(got[same], expected[same])
        assert decoder._static is not None
        addresses.add(decoder._static.keys[0].data_ptr())
    assert len(addresses) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("settings", [RING, SNAPKV, {"method": "full"}], ids=lambda s: str(s["method"]))
@pytest.mark.parametrize("more", [{"do_sample": False}, {"do_sample": True, "top_k": 5}], ids=str)
def test_generate_over_the_compiled_step_is_generate(settings: dict[str, object], more: dict[str, object]) -> None:
    """With its stops and its sampling, prompts in chunks, and the same numbers of slots and bytes at every step."""
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in (40, 14)]
    ids, mask, _ = tiny.left_padded(rows)
    decoder, out, numbers = Decoder(pair.model, backend="eager"), [], []
    for compiled in (False, True):
        cache = make_cache(tiny.compression(**settings), pair.facts, prefill_chunk=16)
        feed_beginning(pair.model, cache, rows)
        cache.keep_history(True)
        torch.manual_seed(0)
        with decoder.decoding(cache, 30) if compiled else nullcontext():
            out.append(
                pair.model.generate(
                    ids, attention_mask=mask, **tiny.given(cache), max_new_tokens=30, pad_token_id=0,
                    eos_token_id=[3, 4, 5, 6, 7], **more,
                )
            )  # fmt: skip
        history = cache.join().history
        numbers.append((cache.seen, cache.held, cache.peaks, history, cache.snapshot()["kv_bytes_valid"]))
    assert torch.equal(out[0], out[1])
    assert numbers[0] == numbers[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert pair.model.forward.__qualname__ == type(pair.model).forward.__qualname__, "the model is as it was"


def test_decoding_stops_once_all_rows_have_ended() -> None:
    cache, logits = prefilled("llama", RING, (30, 14))
    asked = []

    def ended(rows: list[list[int]]) -> list[bool]:
        asked.append(len(rows[0]))
        return [True, len(rows[0]) >= 8]

    out = Decoder(tiny.pair("llama").model, backend=None).greedy(cache, logits, 50, ended, look_every=4)
    assert asked == [4, 8]
    assert out.shape == (2, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "tova", "max_capacity_prompt": 12}, "compress_every=1: cuts go on"),
        ({"method": "streaming_llm", "n_sink": 2, "window_size": 9}, "method=streaming_ring overwrites"),
        ({"method": "quantized", "nbits": 8, "group_size": 8}, "change their form"),
        ({**RING, "n_sink": 8}, "shorter than n_sink=8"),
    ],
    ids=str,
)
def test_caches_that_change_their_shape_are_refused(settings: dict[str, object], message: str) -> None:
    cache, logits = prefilled("llama", settings, (30, 6))
    with pytest.raises(UserError, match=message):
        Decoder(tiny.pair("llama").model, backend=None).greedy(cache, logits, 4)


@pytest.mark.slow
@torch.inference_mode()
def test_the_real_compiler_gives_the_same_logits() -> None:
    pair = tiny.pair("llama")
    (cache, logits), (other, _) = (prefilled("llama", RING, (30, 14)) for _ in range(2))
    decoder = Decoder(pair.model)
    static, ids = decoder.start(cache, 20), logits.argmax(-1, keepdim=True)
    for _ in range(20):
        got = decoder.step(static, ids)
        expected = tiny.forward(pair.model, other, ids.tolist(), list(other.seen))[:, -1]
        assert (got - expected).abs().max() <= 1e-4
        ids = got.argmax(-1, keepdim=True)

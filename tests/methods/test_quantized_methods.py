"""Quantised storage under every kind of method: rows for themselves, streams, forks, what stays exact, the numbers."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch

from kv_lm_eval.cache.quantized import QuantizedStore
from kv_lm_eval.config import parse
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import base

SMALL = {"nbits": 8, "group_size": 4, "residual_length": 6}


def holds_fewer_bits(cls: type[base.Method]) -> bool:
    """Whether pairs that the method keeps may be quantised: not those of a ring, nor of the full cache by that name."""
    return cls.uses_cache and not cls.ring and (cls.compresses or "nbits" in cls.presets)


METHODS = {
    **{name: tiny.example(name, 30) for name in tiny.methods(holds_fewer_bits)},
    "streaming_llm absolute": {"method": "streaming_llm", "n_sink": 2, "window_size": 28, "positions": "absolute"},
    "knorm": {"method": "knorm", "max_capacity_prompt": 30, "compress_every": 3},
    "h2o": {"method": "h2o", "max_capacity_prompt": 30, "compress_every": 3},
    "adakv": {"method": "adakv", "window_size": 4, "max_capacity_prompt": 30, "compress_every": 5},
    "cam": {"method": "snapkv", "window_size": 4, "max_capacity_prompt": 30, "evicted": "cam", "compress_every": 4},
    "d2o": {"method": "h2o", "max_capacity_prompt": 30, "evicted": "d2o", "compress_every": 4},
}
# Two runs may round one number of thousands to neighbouring steps, where they differ by a float's rounding. In float64
# (GPT-NeoX computes all of it in the model's precision) that does not happen; of logits of size 10 in float32 it does.
NEAR = {"gpt_neox": 1e-5}
STEP = 0.05


@functools.cache
def in_float64() -> tiny.Pair:
    model = tiny.build("gpt_neox").double()
    return tiny.Pair(model, model, tiny.wrap(model, tiny.compression(method="streaming_llm", window_size=8)))


def pair_of(name: str) -> tiny.Pair:
    return in_float64() if name == "gpt_neox" else tiny.pair(name)


def settings(method: str, **more: object) -> dict[str, object]:
    return {**METHODS[method], **SMALL, **more}


def decoded(name: str, rows: list[list[int]], steps: int, **chosen: object) -> tuple[torch.Tensor, object]:
    """Logits of a prompt's last token and of so many tokens after it, and the cache."""
    pair = pair_of(name)
    cache = pair.cache(**chosen)
    cache.keep_history(True)
    out = [tiny.forward(pair.model, cache, rows)[:, -1]]
    for t in range(steps):
        new = [[1 + (7 * t + len(row)) % 90] for row in rows]
        out.append(tiny.forward(pair.model, cache, new, starts=[len(row) + t for row in rows])[:, -1])
    return torch.stack(out, 1), cache


@pytest.mark.parametrize(
    ("name", "method"),
    [*tiny.cases(METHODS, ["llama", "gpt_neox"]), ("mistral_sliding", "knorm"), ("gemma3", "h2o"), ("gpt2", "snapkv")],
)
def test_a_row_is_the_same_in_a_padded_batch_as_alone(name: str, method: str) -> None:
    rows = [tiny.tokens(n, seed=n) for n in (61, 44, 3)]
    together, batch = decoded(name, rows, 14, **settings(method))
    for i, row in enumerate(rows):
        alone, single = decoded(name, [row], 14, **settings(method))
        assert (alone[0] - together[i]).abs().max() <= NEAR.get(name, STEP)
        segment, at = batch.of_row(i)
        for a, b in zip(single.stores, segment.stores, strict=True):
            assert isinstance(a, QuantizedStore) and (a.exact[0], a.coded[0]) == (b.exact[at], b.coded[at])
            heads = a.keys.shape[1]
            for one, same in zip(a.pos[0].expand(heads, -1), b.pos[at].expand(heads, -1), strict=True):
                assert torch.equal(one[one >= 0], same[same >= 0])
        assert single.snapshot()["kv_bytes_valid"][0] == batch.snapshot()["kv_bytes_valid"][i]
    assert any(sum(map(sum, store.coded)) for segment in batch.segments for store in segment.stores)


@pytest.mark.parametrize("method", ["quantized", "snapkv", "streaming_llm", "knorm", "h2o", "adakv"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_stream_in_segments_equals_the_loop_over_single_tokens(name: str, method: str) -> None:
    pair, every = pair_of(name), 7
    documents = [tiny.tokens(n, seed=n) for n in (75, 52, 9)]
    chosen = {**settings(method), **({} if method == "quantized" else {"compress_every": every})}
    scored, _ = score_documents(pair.model, lambda: pair.cache(**chosen), documents, Stream(5, every))
    for document, got in zip(documents, scored, strict=True):
        cache, logs = pair.cache(**chosen), []
        for i, (token, target) in enumerate(zip([5, *document[:-1]], document, strict=True)):
            cache.mode = "decode"
            logits = tiny.forward(pair.model, cache, [[token]], starts=[i])[0, -1]
            logs.append(logits.log_softmax(-1)[target])
        assert (got.log_probs - torch.stack(logs)).abs().max() <= NEAR.get(name, STEP)
        exact, _ = score_documents(
            pair.model, lambda: pair.cache(**{**chosen, "nbits": 2}), [document], Stream(5, every)
        )
        if len(document) > 50:
            assert (exact[0].log_probs - got.log_probs).abs().max() > STEP, "with 2 bits the difference would be seen"


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_prompts_own_forward_sees_exact_keys_and_later_ones_the_coded(name: str) -> None:
    row = tiny.tokens(80)
    full, _ = decoded(name, [row], 6, method="full")
    errors = {}
    for nbits in (2, 4, 8):
        out, cache = decoded(name, [row], 6, **settings("quantized", nbits=nbits))
        assert torch.equal(out[:, 0], full[:, 0])
        errors[nbits] = (out[:, 1:] - full[:, 1:]).norm() / full[:, 1:].norm()
        keys, exact = cache.stores[0].keys, decoded(name, [row], 6, method="full")[1].stores[0].keys
        assert torch.equal(keys[:, :, -6:], exact[:, :, -6:]) and not torch.equal(keys, exact)
    assert errors[2] > 2 * errors[4] and errors[4] > 4 * errors[8] and errors[8] < 0.02


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("method", ["snapkv", "knorm", "adakv", "streaming_llm"])
def test_the_first_cut_keeps_what_it_keeps_without_quantisation(name: str, method: str) -> None:
    row = tiny.tokens(70, seed=2)
    cache, plain = decoded(name, [row], 0, **settings(method))[1], decoded(name, [row], 0, **METHODS[method])[1]
    assert all(tiny.kept(cache, layer) == tiny.kept(plain, layer) for layer in range(2))
    assert cache.snapshot()["kv_bytes_valid"][0] < plain.snapshot()["kv_bytes_valid"][0]


def test_moved_sinks_are_exact_however_often_they_move() -> None:
    row = tiny.tokens(60, seed=4)
    moved = {**METHODS["streaming_llm"], "compress_every": 5}  # without holes, so that slots can be compared
    quantised = decoded("llama", [row], 40, **settings("streaming_llm", nbits=2, compress_every=5))[1].stores[0]
    plain = decoded("llama", [row], 40, **moved)[1].stores[0]
    assert (quantised.keys[:, :, :2] - plain.keys[:, :, :2]).abs().max() <= 1e-5
    assert torch.equal(quantised.keys[:, :, -6:], plain.keys[:, :, -6:])
    assert (quantised.keys - plain.keys).abs().max() > 0.1


@pytest.mark.parametrize("method", ["knorm", "streaming_llm", "h2o", "adakv"])
def test_a_pair_is_coded_once_and_then_only_kept_or_dropped(method: str) -> None:
    pair, row = tiny.pair("llama"), tiny.tokens(60, seed=6)
    cache = pair.cache(**settings(method, nbits=2))
    tiny.forward(pair.model, cache, [row])
    known: dict[tuple[int, int], torch.Tensor] = {}
    for t in range(60):
        tiny.forward(pair.model, cache, [[1 + t]], starts=[60 + t])
        store = cache.stores[1]
        keys, pos = torch.cat([store.keys, store.values], -1), store.pos.expand(-1, 2, -1)
        for head in range(2):
            slots = (pos[0, head] >= 0).nonzero().squeeze(1)[store.sinks :][: store.coded[0][head]]
            for slot in slots.tolist():
                first = known.setdefault((head, int(pos[0, head, slot])), keys[0, head, slot].clone())
                assert torch.equal(keys[0, head, slot], first)
    assert len(known) > 60


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_takes_less(method: str, dtype: torch.dtype) -> None:
    model = tiny.build("llama").to(dtype)
    chosen = settings(method, nbits=4)
    pair = tiny.Pair(model, model, tiny.wrap(model, tiny.compression(**chosen)))
    rows = [tiny.tokens(n, seed=n) for n in (61, 30)]
    cache = pair.cache(**chosen)
    assert tiny.forward(pair.model, cache, rows)[:, -1].isfinite().all()
    for t in range(9):
        assert tiny.forward(pair.model, cache, [[t + 1], [t + 2]], starts=[61 + t, 30 + t]).isfinite().all()
    assert all(store.keys.dtype == dtype for store in cache.stores)


def test_bytes_by_hand_of_the_default_settings() -> None:
    pair = tiny.pair("llama")  # 2 layers, 2 KV heads, head size 8, float32
    cache = pair.cache(method="quantized")
    tiny.forward(pair.model, cache, [tiny.tokens(300), tiny.tokens(100)])
    numbers = cache.snapshot()
    coded, exact = 160, 140  # 128 and what does not fill a group of 32
    key = coded * (4 + 2) + coded // 32 * 8 * (2 + 2)  # codes and number of the group; scale and zero of 8 channels
    value = coded * (4 + 2 + 2)  # codes; scale and zero of the pair's one group of 8
    assert numbers["kv_bytes_valid"] == [2 * 2 * (key + value + exact * 2 * 8 * 4), 2 * 2 * 100 * 2 * 8 * 4]
    assert numbers["compressed"] == [True, False] and numbers["kept_fraction"] == [1.0, 1.0]
    held = sum(store.allocated_bytes for segment in cache.segments for store in segment.stores)
    assert numbers["kv_bytes_allocated"] == held / 2
    assert held < 2 * 2 * 2 * (key + value + (exact + 32) * 2 * 8 * 4) + 1


def test_a_row_of_a_batch_is_counted_at_its_own_end() -> None:
    _, long = decoded("llama", [tiny.tokens(50)], 12, **settings("quantized"))
    _, short = decoded("llama", [tiny.tokens(50)], 3, **settings("quantized"))
    assert long.snapshot([3])["kv_bytes_valid"] == short.snapshot()["kv_bytes_valid"]


@pytest.mark.parametrize("method", ["quantized", "snapkv", "knorm"])
def test_choices_are_scored_over_the_coded_context_whether_it_is_shared_or_not(method: str) -> None:
    pair, context = tiny.pair("llama"), tiny.tokens(60, seed=9)
    answers, chosen = [[4, 5, 6], [7], [8, 9]], settings(method, nbits=4)
    new_cache = lambda: pair.cache(**chosen)  # noqa: E731
    (shared,), cache = score_continuations(pair.model, new_cache, [context], [answers], tail_tokens=1)
    assert cache.snapshot()["compressed"] == [True]
    for answer, (log_prob, _) in zip(answers, shared, strict=True):
        ((alone,),), _ = score_continuations(pair.model, new_cache, [context], [[answer]], tail_tokens=1)
        assert abs(alone[0] - log_prob) <= 1e-3
        by_hand = pair.cache(**chosen)
        tiny.forward(pair.model, by_hand, [context[:-1]])
        logits = tiny.forward(pair.model, by_hand, [context[-1:]], starts=[59])[0, -1:]
        for t in range(len(answer) - 1):  # 62 tokens at most: no multiple of group_size comes after the 60th
            logits = torch.cat([logits, tiny.forward(pair.model, by_hand, [[answer[t]]], starts=[60 + t])[0, -1:]])
        expected = logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum()
        assert abs(expected - log_prob) <= 1e-3
    full, _ = score_continuations(pair.model, lambda: pair.cache(method="full"), [context], [answers], tail_tokens=1)
    assert abs(full[0][0][0] - shared[0][0]) > 1e-3


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"method": "quantized", "nbits": 5}, ["nbits=5", "2, 3, 4, 8"]),
        ({"method": "quantized", "nbits": 0}, ["method=full"]),
        ({"method": "quantized", "nbits": "none"}, ["method=full"]),
        ({"method": "full", "nbits": 4}, ["nbits", "full"]),
        (
            {"method": "knorm", "max_capacity_prompt": 8, "residual_length": 4},
            ["residual_length=4", "no effect", "nbits"],
        ),
        ({"method": "streaming_ring", "window_size": 8, "nbits": 4}, ["nbits=4", "method=streaming_llm"]),
        ({"method": "quantized", "key_axis": "row"}, ["key_axis=row", "channel, token"]),
        ({"method": "quantized", "group_size": 0}, ["group_size=0"]),
        ({"method": "quantized", "residual_length": -1}, ["residual_length=-1"]),
        ({"method": "quantized", "max_capacity_prompt": 8}, ["max_capacity_prompt", "quantized takes"]),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(chosen: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(chosen, pass_through=set())
    assert all(word in str(error.value) for word in words), str(error.value)


def test_settings_are_reported_where_they_act() -> None:
    assert parse({"method": "quantized"})[0].settings() == {
        **{"method": "quantized", "nbits": 4, "group_size": 32, "residual_length": 128},
        **{"key_axis": "channel", "value_axis": "token"},
    }
    assert parse({"method": "knorm", "max_capacity_prompt": 8, "nbits": 2.0})[0].settings()["nbits"] == 2
    assert "nbits" not in parse({"method": "knorm", "max_capacity_prompt": 8, "nbits": "none"})[0].settings()

"""Every form of storage under every kind of method: rows for themselves, streams, choices, half precision, settings."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from kv_lm_eval.config import parse
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import storage

FORMS: dict[str, dict[str, Any]] = {  # how the forms are shown here; one without a line is taken as it comes
    "kivi": {"nbits": 3, "k_bits": 4, "group_size": 4, "residual_length": 6},
    "fp8": {"calibration_tokens": 16},
    "turboquant": {"nbits": 3},
    "think": {
        "key_channel_ratio": 0.2,
        "calibration_tokens": 16,
        "residual_length": 6,
        "channel_queries": 8,
        "code_every": 1,
    },
}
CASES = {
    **{name: {storage.KEY: name, **FORMS.get(name, {})} for name in storage.available()[1:]},
    "fp8 e5m2": {storage.KEY: "fp8_e5m2", "calibration_tokens": 8, "residual_length": 5},
    "fp8 per token": {storage.KEY: "fp8_per_token_head", "code_every": 3},
    "think late": {
        storage.KEY: "think",
        "key_channel_ratio": 0.13,
        "calibration_tokens": 40,
        "code_every": 5,
        "residual_length": 4,
    },
    "turboquant qjl": {storage.KEY: "turboquant", "v_bits": 2, "qjl": True, "residual_length": 4},
}
METHODS = {
    "quantized": {"method": "quantized"},
    "snapkv": {"method": "snapkv", "window_size": 4, "max_capacity_prompt": 30},
    "knorm online": {"method": "knorm", "max_capacity_prompt": 30, "compress_every": 3},
    "ada": {"method": "adakv", "window_size": 4, "max_capacity_prompt": 30, "compress_every": 5},
    "sinks": {"method": "streaming_llm", "n_sink": 2, "window_size": 28},
    "d2o": {"method": "h2o", "max_capacity_prompt": 30, "evicted": "d2o", "compress_every": 4},
    "compensate": {"method": "snapkv_comp", "window_size": 4, "block_size": 4, "max_capacity_prompt": 30},
}
NEAR = 0.02  # of logits of size 10, where the full cache's are 0.3 and more away


def decoded(name: str, rows: list[list[int]], steps: int, **chosen: object) -> tuple[torch.Tensor, Any]:
    """Logits of a prompt's last token and of so many tokens after it, and the cache."""
    pair = tiny.pair(name)
    cache = pair.cache(**chosen)
    out = [tiny.forward(pair.model, cache, rows)[:, -1]]
    for t in range(steps):
        new = [[1 + (7 * t + len(row)) % 90] for row in rows]
        out.append(tiny.forward(pair.model, cache, new, starts=[len(row) + t for row in rows])[:, -1])
    return torch.stack(out, 1), cache


@pytest.mark.parametrize("form", CASES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_row_is_the_same_in_a_padded_batch_as_alone(name: str, method: str, form: str) -> None:
    rows, chosen = [tiny.tokens(n, seed=n) for n in (61, 44, 3)], {**METHODS[method], **CASES[form]}
    together, batch = decoded(name, rows, 9, **chosen)
    for i, row in enumerate(rows):
        alone, single = decoded(name, [row], 9, **chosen)
        assert (alone[0] - together[i]).abs().max() <= NEAR
        assert single.snapshot()["kv_bytes_valid"][0] == batch.snapshot()["kv_bytes_valid"][i]
        segment, at = batch.of_row(i)
        for a, b in zip(single.stores, segment.stores, strict=True):
            assert (a.exact[0], a.coded[0]) == (b.exact[at], b.coded[at])
    assert sum(map(sum, batch.segments[0].stores[0].coded))


@pytest.mark.parametrize("form", CASES)
@pytest.mark.parametrize("method", ["quantized", "knorm online"])
def test_a_stream_in_segments_equals_the_loop_over_single_tokens(method: str, form: str) -> None:
    pair, every = tiny.pair("llama"), 7
    documents = [tiny.tokens(n, seed=n) for n in (55, 9)]
    chosen = {**METHODS[method], **CASES[form], **({} if method == "quantized" else {"compress_every": every})}
    scored, _ = score_documents(pair.model, lambda: pair.cache(**chosen), documents, Stream(5, every))
    for document, got in zip(documents, scored, strict=True):
        cache, logs = pair.cache(**chosen), []
        for i, (token, target) in enumerate(zip([5, *document[:-1]], document, strict=True)):
            cache.mode = "decode"
            logits = tiny.forward(pair.model, cache, [[token]], starts=[i])[0, -1]
            logs.append(logits.log_softmax(-1)[target])
        assert (got.log_probs - torch.stack(logs)).abs().max() <= NEAR


@pytest.mark.parametrize("form", CASES)
def test_the_prompts_own_forward_sees_exact_keys_and_later_ones_the_coded(form: str) -> None:
    row = tiny.tokens(80)
    full, _ = decoded("llama", [row], 5, method="full")
    out, cache = decoded("llama", [row], 5, **METHODS["quantized"], **CASES[form])
    assert torch.equal(out[:, 0], full[:, 0])
    assert 0.002 < (out[:, 1:] - full[:, 1:]).norm() / full[:, 1:].norm() < 0.8
    numbers = cache.snapshot()
    assert numbers["compressed"] == [True] and numbers["kept_fraction"] == [1.0]


@pytest.mark.parametrize("form", CASES)
def test_choices_are_scored_over_the_coded_context(form: str) -> None:
    pair, context = tiny.pair("llama"), tiny.tokens(60, seed=9)
    answers, chosen = [[4, 5, 6], [7], [8, 9]], {**METHODS["snapkv"], **CASES[form]}
    new_cache = lambda: pair.cache(**chosen)  # noqa: E731
    (shared,), cache = score_continuations(pair.model, new_cache, [context], [answers], tail_tokens=1)
    assert cache.snapshot()["compressed"] == [True]
    for answer, (log_prob, _) in zip(answers, shared, strict=True):
        ((alone,),), _ = score_continuations(pair.model, new_cache, [context], [[answer]], tail_tokens=1)
        assert abs(alone[0] - log_prob) <= 1e-3


@pytest.mark.parametrize("form", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(form: str, dtype: torch.dtype) -> None:
    model, chosen = tiny.build("llama").to(dtype), {**METHODS["d2o"], **CASES[form]}
    pair = tiny.Pair(model, model, wrap(model, tiny.compression(**chosen)))
    cache = pair.cache(**chosen)
    assert tiny.forward(pair.model, cache, [tiny.tokens(61), tiny.tokens(30)])[:, -1].isfinite().all()
    for t in range(9):
        assert tiny.forward(pair.model, cache, [[t + 1], [t + 2]], starts=[61 + t, 30 + t]).isfinite().all()
    assert all(store.keys.dtype == dtype for store in cache.stores)


def test_the_codebook_is_counted_once_and_beside_the_pairs() -> None:
    _, cache = decoded("llama", [tiny.tokens(80)], 2, method="quantized", kv_cache_dtype="turboquant", nbits=3)
    numbers, tokens = cache.snapshot(), 82
    assert numbers["kv_bytes_valid"] == [tokens * 2 * 2 * 2 * (3 + 2)]  # layers, heads, keys and values; codes, norm
    positions = sum(store.overhead_bytes for store in cache.stores)
    assert numbers["overhead_bytes"] == positions + 8 * 4 + 8 * 8 * 4


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"kv_cache_dtype": "fp7"}, ["kv_cache_dtype=fp7", "fp8_e5m2", "turboquant"]),
        ({"kv_cache_dtype": "fp8", "nbits": 4}, ["nbits=4", "kv_cache_dtype=fp8", "kivi or turboquant"]),
        ({"kv_cache_dtype": "fp8_e5m2", "fp8_format": "e4m3"}, ["stands for fp8_format=e5m2", "e4m3"]),
        ({"kv_cache_dtype": "turboquant", "nbits": 8}, ["nbits=8", "2, 3, 4"]),
        ({"kv_cache_dtype": "turboquant", "group_size": 8}, ["group_size=8", "no effect", "kivi"]),
        ({"kv_cache_dtype": "fp8", "code_every": 0}, ["code_every=0"]),
        ({"kv_cache_dtype": "fp8", "calibration_tokens": 0}, ["calibration_tokens=0"]),
        ({"kv_cache_dtype": "fp8", "residual_length": -1}, ["residual_length=-1"]),
        ({"kv_cache_dtype": "kivi", "nbits": 0}, ["nbits=0", "nothing", "nbits=4"]),
        ({"kv_cache_dtype": "kivi"}, ["kivi", "nbits=4"]),
        ({"k_bits": 4}, ["k_bits=4", "values", "v_bits"]),
        ({"qjl": True}, ["qjl=True", "no effect", "kv_cache_dtype"]),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(chosen: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse({"method": "knorm", "max_capacity_prompt": 8, **chosen}, pass_through=set())
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_form_goes_by_the_names_of_vllm_and_says_what_it_is() -> None:
    knorm = {"method": "knorm", "max_capacity_prompt": 8}
    for asked, reported in (
        ({"kv_cache_dtype": "fp8_e5m2"}, {"kv_cache_dtype": "fp8", "fp8_format": "e5m2", "fp8_scale": "head"}),
        ({"kv_cache_dtype": "FP8"}, {"kv_cache_dtype": "fp8", "fp8_format": "e4m3"}),
        ({"kv_cache_dtype": "turboquant", "v_bits": 2}, {"kv_cache_dtype": "turboquant", "nbits": 4, "v_bits": 2}),
        ({"kv_cache_dtype": "think"}, {"kv_cache_dtype": "think", "key_channel_ratio": 0.4, "residual_length": 32}),
        ({"key_channel_ratio": 0.5}, {"kv_cache_dtype": "think", "key_channel_ratio": 0.5, "code_every": 32}),
        ({"k_bits": 8, "v_bits": 4}, {"k_bits": 8, "v_bits": 4, "nbits": 0}),
        ({"kv_cache_dtype": "auto", "nbits": 4}, {"nbits": 4}),
    ):
        settings = parse({**knorm, **asked})[0].settings()
        assert reported.items() <= settings.items()
        assert parse(settings)[0].settings() == settings, "what is reported can be given again"
    assert storage.KEY not in parse({**knorm, "kv_cache_dtype": "auto"})[0].settings()
    with pytest.raises(UserError, match="kv_cache_dtype=fp8"):
        parse({"method": "streaming_ring", "window_size": 8, "kv_cache_dtype": "fp8"})
    with pytest.raises(UserError, match="calibration_tokens=1000 is more than the 512 positions"):
        tiny.compression(**knorm, kv_cache_dtype="fp8", calibration_tokens=1000).check_model(tiny.pair("llama").facts)

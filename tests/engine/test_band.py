"""Banded scoring against the definition, in float64: keys cached before their rotation, numbered by their place.

The reference is an attention function of its own over the stock model with its rotary embedding switched off: one token
at a time, unrotated keys in a list, each rotated to its place in the list whenever a query comes. The angles are the
model's own tables, so that every layout of rotary embeddings that transformers has is covered by the same loop.
"""

from __future__ import annotations

import functools
import sys

import pytest
import tiny
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_lm_eval.cache import band
from kv_lm_eval.engine import streaming
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.streaming import Stream, score_documents, visible_slots

PREFIX = 5
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
}
MODELS = {
    "llama": ("llama", {}),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 2}),
    "qwen3": ("qwen3", {}),
    "yarn": ("llama", YARN),
}


@functools.cache
def doubled(name: str) -> tiny.Pair:
    """A model in float64 throughout: transformers computes norms and rotary tables in float32 whatever the weights."""
    kind, overrides = MODELS[name]
    model, stock = (in_float64(tiny.build(kind, **overrides)) for _ in range(2))
    return tiny.Pair(model, stock, wrap(model, tiny.compression(method="streaming_llm", window_size=8)))


def in_float64(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    model = model.double()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = functools.partial(rms_norm, module)
        if "RotaryEmbedding" in type(module).__name__:
            module.forward = functools.partial(tables, module)
    return model


def rms_norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.weight * x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def tables(module: torch.nn.Module, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = position_ids[..., None].double() * module.inv_freq.double()
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling


@torch.inference_mode()
def reference(
    pair: tiny.Pair, document: list[int], sinks: int, window: int, every: int, slack: int = 0, drop: int = 0
) -> torch.Tensor:
    """Log-probabilities, one token a forward; a cut when `every` more than sinks + window are held."""
    held: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    rotary = next(m for m in pair.stock.modules() if "RotaryEmbedding" in type(m).__name__)
    stock_tables = rotary.forward
    capacity = sinks + window

    def attend(module, query, key, value, mask, scaling=None, **kwargs):
        pairs = held.setdefault(module.layer_idx, [])
        pairs.append((key, value))
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        groups = query.shape[1] // key.shape[1]

        def at(x: torch.Tensor, place: int) -> torch.Tensor:
            return rotate(x, x, *stock_tables(x, torch.tensor([[place]])))[0]

        q = at(query, len(pairs) - 1)
        scores = torch.stack(
            [(q * at(k, place).repeat_interleave(groups, 1)).sum(-1) * scaling for place, (k, _) in enumerate(pairs)]
        )
        weights = scores.softmax(0).unsqueeze(-1)
        out = (weights * torch.stack([v.repeat_interleave(groups, 1) for _, v in pairs])).sum(0)
        n = len(pairs)
        if n >= capacity + every:
            left = capacity if not drop else min(max(n - drop, capacity), capacity + slack)
            del pairs[sinks : sinks + n - left]
        return out.transpose(1, 2), None

    tf.AttentionInterface.register("mit_reference", attend)
    tf.AttentionMaskInterface.register("mit_reference", lambda *args, **kwargs: None)
    before = pair.stock.config._attn_implementation
    scaling = rotary.attention_scaling
    try:
        pair.stock.set_attn_implementation("mit_reference")
        # a rotation by nothing; the tables' scaling is part of the rotation, and comes with it above
        rotary.forward = lambda x, position_ids: tuple(t / scaling for t in stock_tables(x, position_ids * 0))
        out = []
        for i, (token, target) in enumerate(zip([PREFIX, *document[:-1]], document, strict=True)):
            logits = pair.stock(
                input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[i]]), use_cache=False
            ).logits[0, -1]
            out.append(logits.log_softmax(-1)[target])
    finally:
        pair.stock.set_attn_implementation(before)
        rotary.forward = stock_tables
    return torch.stack(out)


def scored(pair: tiny.Pair, documents: list[list[int]], **values: object) -> list[streaming.ScoredDocument]:
    cache = lambda: pair.cache(method="streaming_llm", **values)  # noqa: E731
    out, used = score_documents(
        pair.model, cache, documents, Stream(PREFIX, int(values["compress_every"]), dtype=torch.float64)
    )
    assert isinstance(used.segments[0], band.Band)
    return out


SCHEDULES = [  # sinks, window, compress_every, cache_slack, max_drop
    (4, 12, 1, 0, 0),
    (0, 9, 1, 0, 0),
    (1, 9, 8, 0, 0),
    (3, 9, 8, 6, 4),
    (3, 9, 8, 2, 3),
]


@pytest.mark.parametrize("chunk", [7, 64, 400])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_token_is_scored_as_the_published_cache_would(
    name: str, schedule: tuple[int, int, int, int, int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "HOLD_TOKENS", chunk)
    monkeypatch.setattr(streaming, "MIN_CHUNK", 1)
    monkeypatch.setattr(band, "BLOCK", 16)
    pair, document = doubled(name), tiny.tokens(150, seed=3)
    expected = expected_scores(name, schedule)
    sinks, window, every, slack, drop = schedule
    for document_scores, n in zip(
        scored(
            pair,
            [document, document[:40]],
            n_sink=sinks,
            window_size=window,
            compress_every=every,
            cache_slack=slack,
            max_drop=drop,
        ),
        (150, 40),
        strict=True,
    ):
        assert (document_scores.log_probs - expected[:n]).abs().max() <= 1e-10


@functools.cache
def expected_scores(name: str, schedule: tuple[int, int, int, int, int]) -> torch.Tensor:
    return reference(doubled(name), tiny.tokens(150, seed=3), *schedule)


@pytest.mark.parametrize("name", MODELS)
def test_positions_brought_back_in_an_endless_stream_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(band, "FAR", 1)
    monkeypatch.setattr(streaming, "HOLD_TOKENS", 8)
    monkeypatch.setattr(streaming, "MIN_CHUNK", 1)
    pair, document = doubled(name), tiny.tokens(150, seed=3)
    bases = []
    prepare = band.Band.prepare

    def watched(self: band.Band, tokens: int) -> None:
        prepare(self, tokens)
        bases.append(self.base)

    monkeypatch.setattr(band.Band, "prepare", watched)
    (got,) = scored(pair, [document], n_sink=4, window_size=12, compress_every=1)
    assert len(set(bases)) > 2, "the positions were brought back more than once"
    assert (got.log_probs - expected_scores(name, (4, 12, 1, 0, 0))).abs().max() <= 1e-10


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 5), st.integers(1, 20), st.integers(1, 12), st.integers(0, 12), st.integers(0, 14),
    st.integers(1, 90), st.integers(0, 40),
)  # fmt: skip
def test_what_a_stream_will_hold_is_known_before_it_runs(
    sinks: int, window: int, every: int, slack: int, drop: int, tokens: int, prefill: int
) -> None:
    """Against a plain loop over a list of tokens; and never more than the peak that is declared."""
    values = {"n_sink": sinks, "window_size": window, "cache_slack": slack, "max_drop": drop, "compress_every": every}
    compression = tiny.compression(method="streaming_llm", **values)
    slots, cuts = visible_slots(compression, tokens, prefill, [0, 1])
    held: list[int] = []
    capacity, seen, expected_cuts = sinks + window, [], []
    for t in range(tokens):
        held.append(t)
        seen.append(len(held))
        n, left = len(held), len(held)
        if t + 1 == min(prefill, tokens):
            left = min(n, capacity)
        elif t + 1 > prefill and n - capacity >= every:
            left = min(max(n - drop, capacity), capacity + slack) if drop else capacity
        if left < n:
            expected_cuts.append((t + 1, n - left))
            del held[sinks : sinks + n - left]
    assert slots.tolist() == seen
    assert cuts == expected_cuts
    prompt = min(prefill, tokens)
    assert max(seen) <= compression.peak_slots(prompt, tokens - prompt, [0, 1])
    assert max(seen) <= max(prompt, capacity + every)


def test_half_precision_streams_stay_finite_and_near_float32() -> None:
    """4,096 evictions: keys of the window are never rotated again, so nothing drifts."""
    pair = tiny.pair("llama")
    document = tiny.tokens(4200)
    values = {"n_sink": 4, "window_size": 60, "compress_every": 1}
    cache = lambda: pair.cache(method="streaming_llm", **values)  # noqa: E731
    exact = score_documents(pair.model, cache, [document], Stream(PREFIX, 1))[0][0].log_probs
    half = tiny.build("llama").to(torch.bfloat16)
    facts = wrap(half, tiny.compression(method="streaming_llm", window_size=8))
    rough = tiny.Pair(half, half, facts)
    cache = lambda: rough.cache(method="streaming_llm", **values)  # noqa: E731
    got = score_documents(half, cache, [document], Stream(PREFIX, 1, dtype=torch.float32))[0][0].log_probs
    error = (got - exact).abs()
    assert got.isfinite().all()
    assert error[-500:].mean() <= 1.5 * error[100:600].mean(), "the error does not grow with the number of evictions"


@pytest.mark.slow
def test_a_million_tokens_take_no_more_memory_than_a_thousand() -> None:
    """The cache and the logits are bounded by window and chunk; the angles stay exact because positions come back."""
    pair = tiny.pair("llama")
    repeated = tiny.tokens(tiny.VOCAB - 1)
    document = repeated * (1_000_000 // len(repeated))
    cache = lambda: pair.cache(method="streaming_llm", n_sink=4, window_size=28)  # noqa: E731
    (scores,), used = score_documents(pair.model, cache, [document], Stream(PREFIX, 1))
    assert used.stores[0].allocated_bytes <= 4 * used.stores[0].bytes_per_slot * 2 * (32 + streaming.HOLD_TOKENS)
    nll = -scores.log_probs[: len(document) // len(repeated) * len(repeated)].view(-1, len(repeated)).double().mean(1)
    assert nll.isfinite().all()
    late, early = nll[-100:], nll[10:110]  # the text is periodic, and with numbered slots so is everything
    assert (late - early).abs().max() <= 1e-3

"""The self-check at wrap time: does this model, through our attention, still say what it said before?

A few dozen tokens, so it costs next to nothing on a 7B model. It compares logits without compression (prefill with
left padding, a chunk, single tokens) with the model's own attention, and refuses what it cannot do exactly, with the
reason. A second probe says whether keys can be moved in position, for the methods that need it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kv_lm_eval.cache import attention
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.rope import RopeKit
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.budget import Everything
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.methods.evicted import Drop
from kv_lm_eval.methods.full import Full
from kv_lm_eval.methods.schedule import Schedule

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # relative, by dtype
LENGTHS = (20, 13)  # tokens of the two left-padded rows
STEPS = (5, 1, 1)  # then a chunk and two single tokens
FULL = Compression(Full(), Everything(), Schedule(), Drop())


def wrap(model: PreTrainedModel, compression: Compression) -> ModelFacts:
    """Puts our attention under the model, proves that it changes nothing, and returns what was learned.

    Raises:
        UserError: the model cannot be served exactly; the message says why. The model is left as it was.
    """
    original = model.config._attn_implementation
    if original == attention.NAME:  # wrapped before, for another method
        original = getattr(model, "_kv_own_attention", "sdpa")
    kind = type(model).__name__
    if not model._can_set_attn_implementation():
        raise UserError(
            f"{kind} does not let its attention function be chosen (transformers' AttentionInterface), so its KV cache "
            "cannot be compressed exactly. Use method=no_cache or --model hf for it."
        )
    attention.register()
    config = model.config.get_text_config()
    facts = ModelFacts(config.num_hidden_layers, getattr(config, "max_position_embeddings", None))
    try:
        expected = _logits(model, lambda: DynamicCache(config=config), original)
        got = _logits(model, lambda: CompressedCache(FULL, facts), attention.NAME)
        _compare(kind, expected, got, model.dtype)
        facts.rope = RopeKit(model, facts.modules)
        if compression.moves_keys is not None:
            _check_positions(model, facts, kind, compression)
        compression.method.check_model(facts)
    except UserError:
        model.set_attn_implementation(original)
        raise
    except Exception as error:
        model.set_attn_implementation(original)
        raise UserError(
            f"{kind} did not pass the self-check, its KV cache cannot be compressed: {type(error).__name__}: {error}"
        ) from error
    model.set_attn_implementation(attention.NAME)
    model._kv_own_attention = original
    return facts


@torch.inference_mode()
def _logits(model: PreTrainedModel, new_cache: Any, implementation: str) -> list[torch.Tensor]:
    """Logits of the real tokens of a left-padded prefill, a chunk and single steps."""
    model.set_attn_implementation(implementation)
    device = device_of(model)
    vocab = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    total = max(LENGTHS) + sum(STEPS)
    ids = torch.randint(0, vocab, (len(LENGTHS), total), generator=generator).to(device)
    mask = torch.ones(len(LENGTHS), total, dtype=torch.long, device=device)
    for row, length in enumerate(LENGTHS):
        mask[row, : max(LENGTHS) - length] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, out, start = new_cache(), [], 0
    for step in (max(LENGTHS), *STEPS):
        end = start + step
        logits = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        ).logits.float()
        out.append(logits[mask[:, start:end].bool()])
        start = end
    return out


def _compare(kind: str, expected: list[torch.Tensor], got: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Refuses the model if any token's logits differ by more than rounding.

    In half precision one token in four may: a mixture of experts can route a token elsewhere over a rounding.
    """
    allowed = TOLERANCE.get(dtype, 1e-1)
    share = 0.75 if dtype in (torch.float16, torch.bfloat16) else 1.0
    for name, a, b in (
        ("prefill", expected[0], got[0]),
        ("chunk", expected[1], got[1]),
        ("decode", torch.cat(expected[2:]), torch.cat(got[2:])),
    ):
        errors = (a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-9)
        error = errors.quantile(share).item() if errors.isfinite().all() else float("nan")
        if not error <= allowed:  # also catches NaN
            raise UserError(
                f"{kind} does not pass the self-check: without any compression, its {name} logits through our "
                f"attention differ from its own by {error:.1e} (relative, allowed {allowed:.0e}). It probably shares "
                "caches between layers or uses attention that we do not reproduce, so its results would be wrong."
            )


def _check_positions(model: PreTrainedModel, facts: ModelFacts, kind: str, compression: Compression) -> None:
    if facts.all_sliding and compression.method.in_cache_sinks:
        raise UserError(
            f"positions=in_cache on {kind}: all of its layers are sliding windows of {facts.sliding_windows[0]} "
            "tokens, which cut off the sinks by their true distance. Use positions=absolute, or switch the model's "
            "sliding window off "
            "with model_kwargs={'sliding_window': None}."
        )
    facts.rope_kinds = probe_positions(model, facts)
    if "other" in facts.rope_kinds:
        assert compression.moves_keys is not None
        asks, instead = compression.moves_keys
        raise UserError(
            f"{asks} on {kind}: its keys cannot be moved by a rotation (learned positions, or frequencies that change "
            f"with the length), which it needs. Use {instead}."
        )


@torch.inference_mode()
def probe_positions(model: PreTrainedModel, facts: ModelFacts) -> list[str]:
    """For each layer: "rope" if rotating a key by d equals having been d later, "nope" if keys ignore positions.

    Anything else is "other".

    Probes a small shift and one beyond the trained context, where frequencies that depend on the length show.
    """
    assert facts.rope is not None
    model.set_attn_implementation(attention.NAME)
    base = _keys_at(model, facts, 0)
    kinds = ["rope"] * facts.num_layers
    original = getattr(model.config.get_text_config(), "original_max_position_embeddings", None)
    for shift in (37, max(facts.max_positions or 0, original or 0) + 88):
        try:
            moved = _keys_at(model, facts, shift)
        except (IndexError, RuntimeError):  # learned positions end at the maximum
            return ["other"] * facts.num_layers
        for layer, (a, b) in enumerate(zip(base, moved, strict=True)):
            if _close(a, b):
                kind = "nope"
            elif facts.rope.available(layer) and _close(
                facts.rope.rotate(a, torch.full((1, 1), shift, device=a.device), layer), b
            ):
                kind = "rope"
            else:
                kind = "other"
            kinds[layer] = kind if kinds[layer] in ("rope", kind) else "other"
    return kinds


def _keys_at(model: PreTrainedModel, facts: ModelFacts, start: int) -> list[torch.Tensor]:
    device = device_of(model)
    ids = torch.randint(
        0, model.config.get_text_config().vocab_size, (1, 16), generator=torch.Generator().manual_seed(1)
    )
    cache = CompressedCache(FULL, facts)
    positions = torch.arange(start, start + 16, device=device).unsqueeze(0)
    model(input_ids=ids.to(device), position_ids=positions, past_key_values=cache, use_cache=True)
    return [store.keys for store in cache.stores]


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    error = ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9)).item()
    return error < (5e-2 if a.dtype in (torch.bfloat16, torch.float16) else 5e-3)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    return next(model.get_input_embeddings().parameters()).device


@functools.cache
def takes_logits_to_keep(forward: Callable[..., Any]) -> bool:
    """Whether a class's forward() can be asked for the last logits only; asked at every forward, so looked up once."""
    return "logits_to_keep" in inspect.signature(forward).parameters

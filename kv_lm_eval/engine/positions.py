"""Two probes of a model's positions, by behaviour: can a key be moved by rotating it, and does its rotation depend on
how long the sequence is?

The first asks each attention module for keys of one and the same hidden states at other positions. What the layers
before it make of other positions is put aside, since in half precision its rounding adds up over layers: behind many of
them the keys of a model that rotates as others do are further apart than any bound that tells something.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kv_lm_eval.cache import hook
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.forward import device_of, logits_of
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.compression import Compression

Rotated = tuple[list[torch.Tensor], list[torch.Tensor]]  # rotary tables, keys


def check(model: PreTrainedModel, facts: ModelFacts, kind: str, compression: Compression) -> None:
    """Notes the `rope_kinds`, for a compression that moves keys; `kind` is the model's class.

    Raises:
        UserError: keys of this model cannot be moved.
    """
    if facts.all_sliding and compression.method.in_cache_sinks:
        raise UserError(
            f"positions=in_cache on {kind}: all of its layers are sliding windows of {facts.sliding_windows[0]} "
            "tokens, which cut off the sinks by their true distance. Use positions=absolute, or switch the model's "
            "sliding window off with model_kwargs={'sliding_window': None}."
        )
    facts.rope_kinds = probe(model, facts)
    if "other" in facts.rope_kinds:
        assert compression.moves_keys is not None
        asks, instead = compression.moves_keys
        raise UserError(
            f"{asks} on {kind}: its keys cannot be moved by a rotation (learned positions, or frequencies that change "
            f"with the length), which it needs. Use {instead}."
        )


@torch.inference_mode()
def probe(model: PreTrainedModel, facts: ModelFacts) -> list[str]:
    """For each layer: "rope" if rotating a key by d equals having been d later, "nope" if keys ignore positions.

    Anything else is "other", and every layer is where what comes into the first one depends on positions.

    Probes a small shift and one beyond the trained context, where frequencies that depend on the length show; only the
    small one where nothing rotates: learned positions end somewhere, and a GPU does not forgive a look beyond.
    """
    assert facts.rope is not None
    model.set_attn_implementation(hook.NAME)
    inputs = _Inputs()
    base = _keys_at(model, facts, 0, inputs)
    kinds = ["rope"] * facts.num_layers
    rotates = any(facts.rope.available(layer) for layer in facts.modules)
    for shift in (37, _far(model, facts)) if rotates else (max(1, min(37, (facts.max_positions or 53) - 16)),):
        moved = _keys_at(model, facts, shift, inputs)
        if not inputs.first_alike:
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


class _Inputs:
    """Hidden states [1, n, M] that attention modules got in the first forward, given to them again in all later ones.

    By the order of calls, since a module may serve several layers.
    """

    def __init__(self) -> None:
        self.first: list[torch.Tensor] = []
        self.first_alike = True  # whether what came into the first call of the last forward was the same

    @contextmanager
    def put(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Within it one forward is recorded, or gets what was recorded."""
        recorded, call = bool(self.first), 0

        def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            nonlocal call
            came = args[0] if args else kwargs.get("hidden_states")
            if came is None:  # a module that calls them otherwise
                return args, kwargs
            if not recorded:
                self.first.append(came)
                return args, kwargs
            kept = self.first[call]
            if call == 0:
                self.first_alike = _close(kept, came)
            call += 1
            return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept})

        hooks = [m.register_forward_pre_hook(swap, with_kwargs=True) for m in dict.fromkeys(modules)]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()


def _far(model: PreTrainedModel, facts: ModelFacts) -> int:
    """A position well beyond the trained context."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [r for r in rope.values() if isinstance(r, dict)]
    original = [getattr(config, "original_max_position_embeddings", None)]
    original += [r.get("original_max_position_embeddings") for r in (rope, *by_layer_type)]
    return max(facts.max_positions or 0, *(n or 0 for n in original)) + 88


@torch.inference_mode()
def border(model: PreTrainedModel, facts: ModelFacts) -> tuple[int | None, bool]:
    """Tokens of a sequence from which on one more changes how those before it are rotated, and whether that is all.

    By behaviour: the rotation and the keys of the first tokens beside one token that stands further and further away.
    The rotation tells a difference of any size: just beyond the border it is too small for keys in half precision.
    """
    rope = facts.rope
    assert rope is not None
    if not any(rope.available(layer) for layer in facts.modules):
        return None, False

    def keys(last: int) -> Rotated:
        device = device_of(model)
        rope.forget(device)
        angles = rope.angles(device, [*range(8), last])
        rope.forget(device)
        return [a[:, :-1] for a in angles], [k[:, :, :-1] for k in _keys_of(model, facts, [*range(8), last])]

    def same(a: Rotated, b: Rotated) -> bool:
        return all(map(torch.equal, a[0], b[0])) and all(map(_close, a[1], b[1]))

    near, top = keys(8), _far(model, facts)
    beyond, above = keys(top), 8
    if same(near, beyond):
        return None, False
    while top - above > 1:
        middle = (above + top) // 2
        if same(near, keys(middle)):
            above = middle
        else:
            top = middle
    settles = same(keys(top), beyond)
    rope.forget(device_of(model))
    return above + 1, settles


def _keys_at(model: PreTrainedModel, facts: ModelFacts, start: int, inputs: _Inputs) -> list[torch.Tensor]:
    with inputs.put([facts.modules[layer] for layer in sorted(facts.modules)]):
        return _keys_of(model, facts, range(start, start + 16))


def _keys_of(model: PreTrainedModel, facts: ModelFacts, at: Sequence[int]) -> list[torch.Tensor]:
    """Keys [1, K, n, D] of each layer, of some tokens at the given positions."""
    device = device_of(model)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (1, len(at)), generator=torch.Generator().manual_seed(1))
    cache = make_cache(FULL, facts)
    logits_of(model, ids.to(device), positions=torch.tensor([list(at)], device=device), cache=cache)
    return [store.keys for store in cache.stores]


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    error = ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9)).item()
    return error < (5e-2 if a.dtype in (torch.bfloat16, torch.float16) else 5e-3)

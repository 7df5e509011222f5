"""Two probes of a model's positions, by behaviour: can a key be moved by rotating it, and does its rotation depend on
how long the sequence is?

The first asks each layer for queries, keys and values of one and the same hidden states at other positions. What the
layers before it make of other positions is put aside, since in half precision its rounding adds up over layers: behind
many of them the keys of a model that rotates as others do are further apart than any bound that tells something.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from kv_lm_eval.cache import hook
from kv_lm_eval.cache.attention import Step
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.engine.forward import device_of, logits_of
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.compression import Compression

LOOSER = 10.0  # times the bound, of hidden states that have come through layers
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
            f"{asks} on {kind}: its keys cannot be moved by a rotation (learned positions, frequencies that change "
            f"with the length, or queries scaled by their place), which it needs. Use {instead}."
        )


@torch.inference_mode()
def probe(model: PreTrainedModel, facts: ModelFacts) -> list[str]:
    """For each layer: "rope" if rotating queries and keys by d equals having been d later, "nope" if they ignore it.

    Anything else is "other", and every layer is where what comes into one of them depends on positions.

    Probes a small shift and one beyond the trained context, where frequencies that depend on the length show; only the
    small one where nothing rotates: learned positions end somewhere, and a GPU does not forgive a look beyond.
    """
    assert facts.rope is not None
    model.set_attn_implementation(hook.NAME)
    inputs = _Inputs()
    base = _heads_at(model, facts, 0, inputs)
    kinds = ["rope"] * facts.num_layers
    rotates = any(facts.rope.available(layer) for layer in facts.modules)
    for shift in (37, _far(model, facts)) if rotates else (max(1, min(37, (facts.max_positions or 53) - 16)),):
        moved = _heads_at(model, facts, shift, inputs)
        if not inputs.alike:
            return ["other"] * facts.num_layers
        for layer, (a, b) in enumerate(zip(base, moved, strict=True)):
            kind = _kind(facts, layer, shift, a, b)
            kinds[layer] = kind if kinds[layer] in ("rope", kind) else "other"
    return kinds


class Heads(NamedTuple):
    """What a layer's attention is given: query [1, H, n, D], key and value [1, K, n, D]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def _kind(facts: ModelFacts, layer: int, shift: int, base: Heads, moved: Heads) -> str:
    """What `shift` tokens do to a layer's attention."""
    if not _close(base.value, moved.value):
        return "other"
    if _close(base.key, moved.key) and _close(base.query, moved.query):
        return "nope"
    assert facts.rope is not None
    if not facts.rope.available(layer):
        return "other"
    delta = torch.full((1, 1), shift, device=base.key.device)
    turned = (facts.rope.rotate(x, delta, layer) for x in (base.query, base.key))
    return "rope" if all(map(_close, turned, (moved.query, moved.key))) else "other"


class _Noting(CompressedCache):
    """Notes what each layer's attention is given."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.heads: dict[int, Heads] = {}

    def attend(self, step: Step, mask: torch.Tensor | None) -> torch.Tensor:
        """As the cache does: [1, n, H, D]."""
        self.heads[step.layer] = Heads(step.query, step.key, step.value)
        return super().attend(step, mask)


class _Inputs:
    """Hidden states [1, n, M] that attention modules got in the first forward, given to them again in all later ones.

    By the order of calls, since a module may serve several layers.
    """

    def __init__(self) -> None:
        self._first: list[torch.Tensor | None] = []
        self.alike = True  # whether what would have come in the last forward was the same

    @contextmanager
    def put(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Within it one forward is recorded, the first, or gets what was recorded."""
        recorded, came = bool(self._first), list[torch.Tensor | None]()

        def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            came.append(args[0] if args else kwargs.get("hidden_states"))  # None: a module that calls them otherwise
            kept = self._first[len(came) - 1] if recorded else None
            if kept is None:
                return args, kwargs
            return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept})

        hooks = [m.register_forward_pre_hook(swap, with_kwargs=True) for m in dict.fromkeys(modules)]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()
        if recorded:
            pairs = [(a, b) for a, b in zip(self._first, came, strict=True) if a is not None and b is not None]
            self.alike = all(_close(a, b, LOOSER if i else 1.0) for i, (a, b) in enumerate(pairs))
        else:
            self._first = came


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
        return [a[:, :-1] for a in angles], [x.key[:, :, :-1] for x in _heads_of(model, facts, [*range(8), last])]

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


def _heads_at(model: PreTrainedModel, facts: ModelFacts, start: int, inputs: _Inputs) -> list[Heads]:
    with inputs.put([facts.modules[layer] for layer in sorted(facts.modules)]):
        return _heads_of(model, facts, range(start, start + 16))


def _heads_of(model: PreTrainedModel, facts: ModelFacts, at: Sequence[int]) -> list[Heads]:
    """Of each layer, of some tokens at the given positions."""
    device = device_of(model)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (1, len(at)), generator=torch.Generator().manual_seed(1))
    cache = _Noting(FULL, facts)
    logits_of(model, ids.to(device), positions=torch.tensor([list(at)], device=device), cache=cache)
    return [cache.heads[layer] for layer in range(facts.num_layers)]


def _close(a: torch.Tensor, b: torch.Tensor, looser: float = 1.0) -> bool:
    error = ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9)).item()
    return error < looser * (2e-2 if a.dtype in (torch.bfloat16, torch.float16) else 5e-3)

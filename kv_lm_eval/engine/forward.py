"""The one place that calls the model, and every word of transformers' forward() and generate() that we rely on.

Names differ between versions of transformers and between models with code of their own: they are read from the function
that will be called.

Shapes: B rows, q tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kv_lm_eval.errors import UserError


def logits_of(
    model: PreTrainedModel,
    ids: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cache: Cache | None = None,
    keep: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Logits of one forward: [B, keep, V] of the last `keep` columns, [B, q, V] of all with keep=0; or of the columns
    whose numbers `keep` lists, [n].

    Args:
        ids: [B, q]. positions: [B, q]. mask: [B, >= q] 0 where a token is padding, None: nowhere.
        cache: read and added to; None: the model is called without any.
    """
    given = {"position_ids": positions, "attention_mask": mask}
    words: dict[str, Any] = {name: x.to(ids.device) for name, x in given.items() if x is not None}
    forward = forward_of(model)
    if cache is not None:
        words[cache_argument(forward)] = cache
    there = "logits_to_keep" in _parameters(forward)
    if there and (isinstance(keep, torch.Tensor) or keep):
        words["logits_to_keep"] = keep.to(ids.device) if isinstance(keep, torch.Tensor) else keep
    out: torch.Tensor = model(input_ids=ids, use_cache=cache is not None, **words).logits
    if isinstance(keep, torch.Tensor):
        return out if there else out[:, keep.to(out.device)]
    return out[:, -keep:] if keep else out


def forward_of(model: Any) -> Callable[..., Any]:
    """The forward() of a model's class, below PEFT."""
    return type(below_adapter(model)).forward


def cache_argument(function: Callable[..., Any]) -> str:
    """What a function calls the cache: `cache`, before transformers 5.24 `past_key_values`."""
    return "cache" if "cache" in _parameters(function) else "past_key_values"


def generate_with(cache: Cache | None) -> dict[str, Any]:
    """The arguments with which generate() goes on from a cache; none without one."""
    return {} if cache is None else {cache_argument(CausalLMOutputWithPast): cache}


def cache_among(words: dict[str, Any]) -> Cache | None:
    """The cache among the arguments that generate() has for the model."""
    cache: Cache | None = words.get(cache_argument(CausalLMOutputWithPast))
    return cache


def output(logits: torch.Tensor, cache: Cache) -> CausalLMOutputWithPast:
    """What a forward() returns: logits [B, q, V] and the cache, as generate() looks for it."""
    return CausalLMOutputWithPast(logits=logits, **generate_with(cache))


def below_adapter(model: Any) -> Any:
    """The transformers model itself, below PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one token in the full cache."""
    cfg = model.config.get_text_config()
    heads = getattr(cfg, "num_key_value_heads", None) or cfg.num_attention_heads
    size = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    return int(2 * cfg.num_hidden_layers * heads * size * model.dtype.itemsize)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = next(embeddings.parameters()).device
    if device.type != "meta":
        return device
    hook = getattr(embeddings, "_hf_hook", None)  # accelerate offloads weights and brings them where they compute
    devices = [getattr(h, "execution_device", None) for h in (hook, *getattr(hook, "hooks", ()))]
    if not (found := [d for d in devices if d is not None]):
        raise UserError(f"{type(model).__name__} has no weights (they are on the device `meta`): load them first")
    return torch.device(found[0])


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's parameters; asked at every forward, so looked up once."""
    return frozenset(inspect.signature(function).parameters)

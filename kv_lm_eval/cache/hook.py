"""Where transformers calls us: the one attention function, and the one mask function, registered with it.

Shapes: B batch rows, H query heads, K KV heads, q new tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from kv_lm_eval.cache.attention import Step
from kv_lm_eval.cache.face import Face
from kv_lm_eval.errors import UserError

NAME = "kv_lm_eval"
ASKING = "kv_lm_eval_check"  # the same, and every layer notes the window that the model's masks give it

HIDDEN, SHOWN = "_kv_hidden", "_kv_shows_hidden"  # on attention modules

# Arguments that models hand to every attention function and that do not change the result of an inference step.
HARMLESS = frozenset(
    """use_cache output_attentions output_hidden_states output_router_logits return_dict num_items_in_batch
    logits_to_keep cache_position cache past_key_values past_key_value position_embeddings layer_past
    is_causal tokenizer""".split()
)


def show_hidden(modules: Iterable[nn.Module]) -> None:
    """From now on attention is told what its module was given."""
    for module in modules:
        if SHOWN not in module.__dict__:
            module.__dict__[SHOWN] = module.register_forward_pre_hook(_note_hidden, with_kwargs=True)


def _note_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    module.__dict__[HIDDEN] = args[0] if args else kwargs.get("hidden_states")


def register() -> None:
    """Makes the attention function known to transformers under our name; other names are left alone."""
    AttentionInterface.register(NAME, kv_attention)
    AttentionMaskInterface.register(NAME, keep_padding_mask)
    AttentionInterface.register(ASKING, _asking_attention)
    AttentionMaskInterface.register(ASKING, _mask_with_window)


def keep_padding_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Hands the raw padding mask [B, >= q] on to the attention function."""
    return attention_mask


def _mask_with_window(
    *args: Any,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The padding mask with 1 + the mask's own window in the place of 1, so that it reaches the layers that get this
    mask; 1 where there is none.

    Raises:
        UserError: the mask is neither causal nor a causal sliding window.
    """
    assert attention_mask is not None, "the check's rows are padded"
    for query in {0, 1, 2, 50, *(max(0, (local_size or 0) * n + d) for n in (1, 2) for d in (-1, 0, 1))}:
        edge = [max(0, query + d - (local_size or 0)) for d in (-1, 0, 1)]
        keys = sorted({0, 1, query // 2, *edge, query, query + 1})
        got = [bool(mask_function(0, 0, torch.tensor(query), torch.tensor(key))) for key in keys]
        if got != [key <= query and (local_size is None or query - key < local_size) for key in keys]:
            raise UserError(
                "its mask is neither causal nor a causal sliding window (attention within chunks, in both directions, "
                "or of another kind), which is not reproduced here; use method=no_cache or --model hf for it"
            )
    return attention_mask.long() * (1 + (local_size or 0))


def _asking_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`kv_attention` that goes by the window of the mask: what the model does, whatever else it hands over."""
    window = None
    if attention_mask is not None and attention_mask.dim() == 2:
        window = int(attention_mask.max()) - 1 or None
        attention_mask = attention_mask.clamp_max(1)
    return kv_attention(module, query, key, value, attention_mask, **{**kwargs, "sliding_window": window})


def kv_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over the compressed cache: stores the new pairs, attends, then lets the cache cut the layer.

    Args:
        query: [B, H, q, D] and key, value: [B, K, q, D], the new tokens only, rotary embedding applied.
        attention_mask: [B, >= q], 0 where a token is padding, or None.
        position_ids: [1 or B, q] index of each token among the real tokens of its row.
        sliding_window: the layer's own window when the layer is first met; from then on it is what was noted then.

    Returns:
        [B, q, H, D], None

    Raises:
        UserError: the model hands over something that would change the result and is not supported.
    """
    cache, layer = _tagged(module, key)
    if position_ids is None:
        raise UserError(f"{type(module).__name__} does not hand position_ids to its attention function: not supported")
    if odd := [k for k, v in kwargs.items() if v is not None and k not in HARMLESS]:
        raise UserError(f"{type(module).__name__} hands {odd} to its attention function, which is not supported")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UserError(
            "a ready-made 4D attention mask cannot be combined with a compressed cache; pass a 2D padding mask"
        )
    if dropout and module.training:
        raise UserError("the model is in training mode: call model.eval() first")
    cache.facts.meet(layer, module, sliding_window, (query.shape[1], key.shape[1]), key.shape[3])
    window = cache.facts.sliding_windows[layer]
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    pos = position_ids.expand(query.shape[0], -1)
    hidden = getattr(module, HIDDEN, None)
    if hidden is not None:
        delattr(module, HIDDEN)
    device = query.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return cache.attend(Step(layer, query, key, value, pos, scaling, window, softcap, hidden), attention_mask), None
    query, key, value = _as_autocast_takes(query, key, value)
    with torch.autocast(device, enabled=False):  # scores and codes keep the formats that they ask for
        return cache.attend(Step(layer, query, key, value, pos, scaling, window, softcap, hidden), attention_mask), None


def _as_autocast_takes(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """What torch's own attention makes of its arguments [...] under autocast: its format for all, but for float64."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _tagged(module: nn.Module, key: torch.Tensor) -> tuple[Face, int]:
    tag = getattr(key, "_kv_tag", None)
    if tag is None or tag[1] != getattr(module, "layer_idx", tag[1]):
        raise UserError(
            f"the keys that reached layer {getattr(module, 'layer_idx', '?')} of {type(module).__name__} are not those "
            "that it gave to a compressed cache: the model was called without one, or layers share one cache between "
            "layers, or keys are changed after caching (multi-head latent attention); none of these is supported"
        )
    key._kv_tag = None  # type: ignore[attr-defined]  # else the store, which may adopt this tensor, would hold the cache
    return tag

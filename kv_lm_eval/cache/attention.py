"""The one attention function, and the one mask function, registered with transformers.

Masks come from the original position of every slot, never from lengths: a slot is visible if it is not empty, not
in the future, and within the layer's own sliding window. Grouped-query attention never repeats keys or values.

Shapes: B batch rows, H query heads, K KV heads, G = H / K, q new tokens, N slots, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from kv_lm_eval.cache.transfer import at_least_float32, to_device
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Sight

if TYPE_CHECKING:
    from kv_lm_eval.cache.cache import CompressedCache
    from kv_lm_eval.cache.store import LayerStore

NAME = "kv_lm_eval"
ASKING = "kv_lm_eval_check"  # the same, and every layer notes the window that the model's masks give it
MASK_ELEMENTS = 2**25  # queries are attended in blocks whose mask has at most this many elements
WEIGHT_ELEMENTS = 2**24  # the same for explicit attention weights, float32

# Arguments that models hand to every attention function and that do not change the result of an inference step.
HARMLESS = frozenset(
    """use_cache output_attentions output_hidden_states output_router_logits return_dict num_items_in_batch
    logits_to_keep cache_position cache past_key_values past_key_value position_embeddings layer_past
    is_causal""".split()
)


def register() -> None:
    """Makes the attention function known to transformers under our name; other names are left alone."""
    AttentionInterface.register(NAME, kv_attention)
    AttentionMaskInterface.register(NAME, keep_padding_mask)
    AttentionInterface.register(ASKING, _asking_attention)
    AttentionMaskInterface.register(ASKING, _mask_with_window)


def keep_padding_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Hands the raw 2D padding mask on to the attention function."""
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
    cache.facts.meet(layer, module, sliding_window, (query.shape[1], key.shape[1]))
    window = cache.facts.sliding_windows[layer]
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    step = Step(layer, query, key, value, position_ids, attention_mask, scaling, window, softcap)
    return cache.attend(step).transpose(1, 2).contiguous(), None


@dataclass
class Step:
    """One layer of one forward, as a cache's `attend` gets it; shapes as in `kv_attention`."""

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    scaling: float
    window: int | None  # the layer's own sliding window in tokens
    softcap: float | None


def attend_stored(cache: CompressedCache, step: Step) -> torch.Tensor:
    """Stores the new pairs in the layer's store and attends over all that it holds: [B, H, q, D]."""
    layer, query, key, value = step.layer, step.query, step.key, step.value
    scaling, softcap, window = step.scaling, step.softcap, step.window
    if cache.new_pos is None:
        cache.begin(step.position_ids, step.attention_mask, query.shape[0])
    assert cache.new_pos is not None
    pos = cache.new_pos.to(query.device)
    store = cache.stores[layer]
    if cache.per_query_head(layer):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    old = 0 if store.is_empty else store.length
    had_empty = cache.has_empty(layer)
    if cache.mode == "score":
        keys, values = torch.cat([store.keys, key], dim=2), torch.cat([store.values, value], dim=2)
        slot_pos = torch.cat(
            [store.pos, pos.unsqueeze(1).expand(-1, store.pos.shape[1], -1).to(store.pos.dtype)], dim=2
        )
    else:
        if store.holes:
            store.make_room(key.shape[2], int(max(cache.held[layer])))
            old = store.length
        store.append(key, value, pos, cache.new_counts)
        cache.appended(layer)
        keys, values, slot_pos = store.keys, store.values, store.pos
    bias = store.bias
    if bias is not None and cache.mode == "score":
        bias = F.pad(bias, (0, key.shape[2]))
    sight = cache.compression.sight(layer) if cache.facts.compressible(layer) else None
    masked = (
        had_empty
        or bias is not None
        or sight is not None
        or cache.padded
        or cache.branch is not None
        or (window is not None and cache.get_seq_length() + query.shape[2] > window)
    )
    observes = cache.observes and cache.facts.compressible(layer)
    mass = None
    if softcap is not None:
        out = _attend_blocks(
            query, keys, values, pos, slot_pos, old, window, cache.branch, scaling, softcap, bias, sight
        )
    elif observes and cache.compression.method.accumulates and query.shape[2] == 1 and sight is None:
        out, mass = _attend_one(query, keys, values, pos, slot_pos, old, scaling, window, bias)
    elif not masked and old == 0:
        grouped = query.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(
            query, keys, values, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=grouped
        )
    elif not masked and query.shape[2] == 1:
        out = F.scaled_dot_product_attention(packed_queries(query, keys.shape[1]), keys, values, scale=scaling)
        out = out.reshape(query.shape[0], query.shape[1], 1, -1)
    else:
        out = _attend_blocks(query, keys, values, pos, slot_pos, old, window, cache.branch, scaling, None, bias, sight)
    if observes:
        method = cache.compression.method
        if method.num_queries:
            store.observe(query, pos, method.num_queries, cache.padded)
        if method.accumulates:
            if mass is None:
                mass = _received_mass(query, keys, pos, slot_pos, old, scaling, softcap, window, bias)
            store.add_mass(mass)
        if method.moments_from is not None:
            cache.add_moments(layer, query, pos)
    return out


def _tagged(module: nn.Module, key: torch.Tensor) -> tuple[CompressedCache, int]:
    tag = getattr(key, "_kv_tag", None)
    if tag is None or tag[1] != getattr(module, "layer_idx", tag[1]):
        raise UserError(
            f"the keys that reached layer {getattr(module, 'layer_idx', '?')} of {type(module).__name__} are not those "
            "that it gave to a compressed cache: the model was called without one, or layers share one cache, or keys "
            "are changed after caching (multi-head latent attention); none of these is supported"
        )
    key._kv_tag = None  # type: ignore[attr-defined]  # else the store, which may adopt this tensor, would hold the cache
    return tag


def packed_queries(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, H, q, D] -> [B, K, G * q, D]: the query heads of a group become queries of their KV head."""
    b, h, q, d = query.shape
    return query.reshape(b, kv_heads, h // kv_heads * q, d)


def visible(
    pos: torch.Tensor, slot_pos: torch.Tensor, first: int, old: int, window: int | None, branch: torch.Tensor | None
) -> torch.Tensor:
    """Which slots the new tokens first .. first + q - 1 may see: [B, 1 or K, q, N], bool.

    Args:
        pos: [B, q] positions of these queries, -1 for padding. slot_pos: [B, 1 or K, N]; the first `old` slots were
            there before this forward, slot old + i belongs to new token i.
        window: the layer's own sliding window in tokens, or None.
        branch: [B, all new tokens] new tokens see each other only within a branch, or None.
    """
    q, n = pos.shape[1], slot_pos.shape[2]
    device = pos.device
    query_slot = old + first + torch.arange(q, device=device)  # [q]
    slots = torch.arange(n, device=device)
    allowed = (slots[None, :] <= query_slot[:, None]) & (slot_pos >= 0)[:, :, None, :]
    if window is not None:
        allowed = allowed & (pos[:, None, :, None] - slot_pos[:, :, None, :] < window)
    if branch is not None:
        same = branch[:, first : first + q, None] == branch[:, None, :]  # [B, q, new]
        allowed[..., old:] = allowed[..., old:] & same[:, None, :, : n - old]
    itself = slots[None, :] == query_slot[:, None]
    return allowed | (itself & (pos < 0)[:, None, :, None])  # a padded query sees itself: its row would be NaN


def _in_sight(sight: Sight, pos: torch.Tensor, slot_pos: torch.Tensor, group: int) -> torch.Tensor:
    """Which slots each query head may see: [B, 1 or K, G * q, N], bool; pos [B, q], slot_pos [B, 1 or K, N]."""
    everything = torch.iinfo(torch.int32).max
    shape = (1, 1, 1, 1, 1) if len(sight.sinks) == 1 else (1, -1, group, 1, 1)
    sinks = to_device(sight.sinks, pos.device).view(shape)
    windows = to_device([everything if w is None else w for w in sight.windows], pos.device).view(shape)
    slots = slot_pos[:, :, None, None, :]
    seen = (slots < sinks) | (pos[:, None, None, :, None] - slots < windows)  # [B, 1 or K, 1 or G, q, N]
    return seen.expand(-1, -1, group, -1, -1).flatten(2, 3)


def _attend_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pos: torch.Tensor,
    slot_pos: torch.Tensor,
    old: int,
    window: int | None,
    branch: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    bias: torch.Tensor | None,
    sight: Sight | None,
) -> torch.Tensor:
    """Masked attention in blocks of queries: [B, H, q, D]. Memory is bounded by the block, whatever the length.

    Args:
        bias: [B, K, N] float32 added to the logits of each slot, or None.
        sight: what each query head may see of what is visible, or None: all.
    """
    b, h, q, _ = query.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    every_head = softcap is not None or bias is not None or sight is not None
    per_query = b * n * (h if every_head else h // kv_heads * slot_pos.shape[1])
    block = max(1, min(q, (WEIGHT_ELEMENTS if softcap is not None else MASK_ELEMENTS) // per_query))
    if q > 256 and branch is None:
        block = min(block, max(128, q // 8))  # causal: early blocks need only early slots
    outs = []
    for first in range(0, q, block):
        last = min(q, first + block)
        end = n if branch is not None else old + last
        start = 0 if window is None or branch is not None else max(0, old + first - window + 1)
        start = 0 if old else start  # old slots of a sliding layer may have been trimmed: positions decide
        part = slice(start, end)
        mask = visible(pos[:, first:last], slot_pos[:, :, :end], first, old, window, branch)[..., start:]
        mask = mask.repeat(1, 1, h // kv_heads, 1)  # [B, 1 or K, G * q, N]
        if sight is not None:
            mask = mask & _in_sight(sight, pos[:, first:last], slot_pos[:, :, part], h // kv_heads)
        packed = packed_queries(query[:, :, first:last], kv_heads)
        added = None if bias is None else bias[:, :, None, part]
        if softcap is None:
            if added is not None:
                mask = torch.where(mask, added, float("-inf")).to(query.dtype)
            out = F.scaled_dot_product_attention(
                packed, keys[:, :, part], values[:, :, part], attn_mask=mask, scale=scaling
            )
        else:
            weights = attention_weights(packed, keys[:, :, part], mask, scaling, softcap, added)
            out = weights.to(values.dtype) @ values[:, :, part]
        outs.append(out.reshape(b, h, last - first, -1))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def attention_weights(
    packed: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attention weights of packed queries [B, K, x, D] over [B, K, N, D], bias [B, K, 1, N]: [B, K, x, N] float32."""
    scores = at_least_float32(packed @ keys.transpose(2, 3)).mul_(scaling)  # in place where it can be: these are large
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill_(~mask, float("-inf")).softmax(dim=-1)


def _attend_one(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pos: torch.Tensor,
    slot_pos: torch.Tensor,
    old: int,
    scaling: float,
    window: int | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one new token a row, [B, H, 1, D], and what each slot receives from it, as `_received_mass` gives
    it, from one reading of the keys."""
    weights = _new_weights(query, keys, pos, slot_pos, 0, old, scaling, None, window, bias)  # [B, K, G, N]
    out = (weights.to(values.dtype) @ values).reshape(*query.shape[:2], 1, -1)
    return out, weights.mean(2) * (pos >= 0).unsqueeze(2)


def _new_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    pos: torch.Tensor,
    slot_pos: torch.Tensor,
    first: int,
    old: int,
    scaling: float,
    softcap: float | None,
    window: int | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attention weights of the new tokens first .. first + q - 1, query [B, H, q, D] and pos [B, q], over the slots up
    to the last of them: [B, K, G * q, old + first + q] float32."""
    kv_heads, end = keys.shape[1], old + first + query.shape[2]
    mask = visible(pos, slot_pos[:, :, :end], first, old, window, None).repeat(1, 1, query.shape[1] // kv_heads, 1)
    added = None if bias is None else bias[:, :, None, :end]
    return attention_weights(packed_queries(query, kv_heads), keys[:, :, :end], mask, scaling, softcap, added)


def _received_mass(
    query: torch.Tensor,
    keys: torch.Tensor,
    pos: torch.Tensor,
    slot_pos: torch.Tensor,
    old: int,
    scaling: float,
    softcap: float | None,
    window: int | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attention that each slot receives from the new queries, mean over the query heads of a group:
    [B, K, N] float32."""
    b, h, q, _ = query.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    block = max(1, min(q, 128, WEIGHT_ELEMENTS // (b * h * n)))
    mass = at_least_float32(query.new_zeros(0)).new_zeros(b, kv_heads, n)
    for first in range(0, q, block):
        last = min(q, first + block)
        part, block_pos = query[:, :, first:last], pos[:, first:last]
        weights = _new_weights(part, keys, block_pos, slot_pos, first, old, scaling, softcap, window, bias)
        share = (block_pos >= 0).repeat(1, h // kv_heads).to(mass.dtype) / (
            h // kv_heads
        )  # of each packed query, [B, G * q]
        mass[:, :, : old + last] += (share[:, None, None] @ weights).squeeze(2)
    return mass


def window_attention(
    store: LayerStore, last: int, scaling: float, softcap: float | None, window: int | None
) -> torch.Tensor:
    """Attention weights of the last `last` queries of a layer over its slots: [B, K, G, last, N] float32.

    Causal by position; zeros for padded queries and for queries that the store does not have.
    """
    assert store.queries is not None and store.query_pos is not None
    queries, query_pos = store.queries[:, :, -last:], store.query_pos[:, -last:]
    b, h, w, _ = queries.shape
    kv_heads, n = store.keys.shape[1], store.length
    distance = query_pos[:, None, :, None] - store.pos[:, :, None, :]
    allowed = (store.pos >= 0)[:, :, None, :] & (distance >= 0)
    if window is not None:
        allowed = allowed & (distance < window)
    real = (query_pos >= 0)[:, None, :, None] & allowed.any(-1, keepdim=True)
    mask = (allowed | ~real).repeat(1, 1, h // kv_heads, 1)
    added = None if store.bias is None else store.bias[:, :, None]
    weights = attention_weights(packed_queries(queries, kv_heads), store.keys, mask, scaling, softcap, added).view(
        b, kv_heads, h // kv_heads, w, n
    )
    weights = weights * real.unsqueeze(2)
    return F.pad(weights, (0, 0, last - w, 0)) if w < last else weights

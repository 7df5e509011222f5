"""Attention of new tokens over a layer's slots.

A slot is visible if it is not empty, not in the future, and within the layer's own sliding window, by the original
position of its token and never by its place. Grouped-query attention never repeats keys or values.

Shapes: B rows, H query heads, K KV heads, G = H / K, q new tokens, x queries of a block, N slots, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kv_lm_eval.cache.kernels import packed_queries, unmasked
from kv_lm_eval.cache.store import LayerStore
from kv_lm_eval.cache.transfer import at_least_float32, to_device
from kv_lm_eval.cache.view import Sight

MASK_ELEMENTS = 2**25  # queries are attended in blocks whose mask has at most this many elements
WEIGHT_ELEMENTS = 2**24  # the same for explicit attention weights, float32


class Step(NamedTuple):
    """One layer of one forward: what the model hands over of its new tokens.

    Attributes:
        query: [B, H, q, D]; key, value: [B, K, q, D], rotary embedding applied. pos: [B, q] place of each token in
            its row. scaling, softcap: of the attention logits. window: the layer's own sliding window in tokens.
        hidden: [B, q, M] what the attention module was given, for methods that see it; else None.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pos: torch.Tensor
    scaling: float
    window: int | None = None
    softcap: float | None = None
    hidden: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """New tokens of each row."""
        return self.query.shape[2]


class Visible(NamedTuple):
    """The slots over which a step attends, its own new pairs among them.

    Attributes:
        keys, values: [B, K, N, D]. pos: [B, 1 or K, N] place of each slot's token, -1 where empty.
        old: slots that were there before; slot old + i belongs to new token i.
        whole: whether no slot is empty, and nothing but the order of the tokens and `reach` narrows the view.
        reach: slots that a query sees, its own and those before it, where the layer's window is that; None: all.
        bias: [B, K, N] float32 added to the logits of each slot, or None.
        branch: [B, q] new tokens see each other only within a branch, or None.
        sight: what each query head may see of what is visible, or None: all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pos: torch.Tensor
    old: int
    whole: bool
    bias: torch.Tensor | None = None
    branch: torch.Tensor | None = None
    sight: Sight | None = None
    reach: int | None = None


def attend(step: Step, seen: Visible) -> torch.Tensor:
    """Attention of all new tokens: [B, H, q, D]. By the fastest kernel that needs no mask, where none is needed."""
    if seen.whole and step.softcap is None:
        out = unmasked(step.query, seen.keys, seen.values, step.scaling, seen.reach)
        if out is not None:
            return out
    if step.tokens == 1 and step.softcap is None and seen.sight is None:
        return _attend_one(step, seen)
    return torch.cat([_attend_block(step, seen, *block) for block in _blocks(step, seen)], dim=2)


def _attend_one(step: Step, seen: Visible) -> torch.Tensor:
    """Attention of one new token a row, [B, H, 1, D], where slots are hidden; every old one is older than it."""
    kv_heads, mask = seen.keys.shape[1], hidden_from_one(step, seen).logical_not_().unsqueeze(2)
    if seen.bias is not None:
        mask = torch.where(mask, seen.bias.unsqueeze(2), float("-inf")).to(step.query.dtype)
    packed = packed_queries(step.query, kv_heads)
    mask = mask.expand(-1, -1, packed.shape[2], -1)
    out = F.scaled_dot_product_attention(packed, seen.keys, seen.values, attn_mask=mask, scale=step.scaling)
    return out.reshape(*step.query.shape[:2], 1, -1)


def hidden_from_one(step: Step, seen: Visible) -> torch.Tensor:
    """Which slots the one new token of each row does not see, sight aside: [B, 1 or K, N] bool."""
    hidden = seen.pos < 0
    if step.window is not None:
        hidden |= step.pos.unsqueeze(2) - seen.pos >= step.window
    return hidden


def window_logits(store: LayerStore, last: int, step: Step) -> torch.Tensor:
    """What `window_attention` is the softmax of: [B, K, G, last, N] float32, minus infinity where a query does not see
    a slot, and for queries that the store does not have."""
    packed, allowed, bias = _window(store, last, step)
    logits = _logits(packed, store.keys, allowed, step, bias)
    b, kv_heads, n = logits.shape[0], logits.shape[1], logits.shape[3]
    assert store.queries is not None
    logits = logits.view(b, kv_heads, store.queries.shape[1] // kv_heads, -1, n)
    return F.pad(logits, (0, 0, last - logits.shape[3], 0), value=float("-inf"))


def window_attention(store: LayerStore, last: int, step: Step) -> torch.Tensor:
    """Attention weights of the last `last` queries of a layer over its slots: [B, K, G, last, N] float32.

    Causal by position; zeros for queries that the store does not have.
    """
    packed, allowed, bias = _window(store, last, step)
    some = allowed.any(-1, keepdim=True)
    weights = _logits(packed, store.keys, allowed | ~some, step, bias).softmax(dim=-1) * some
    assert store.queries is not None
    b, kv_heads, n = weights.shape[0], weights.shape[1], weights.shape[3]
    weights = weights.view(b, kv_heads, store.queries.shape[1] // kv_heads, -1, n)
    return F.pad(weights, (0, 0, last - weights.shape[3], 0))


def _window(store: LayerStore, last: int, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The last queries, packed [B, K, G * w, D], which slots each sees [B, 1 or K, G * w, N], and the slots' bias."""
    assert store.queries is not None and store.query_pos is not None
    queries, query_pos = store.queries[:, :, -last:], store.query_pos[:, -last:]
    kv_heads = store.keys.shape[1]
    distance = query_pos[:, None, :, None] - store.pos[:, :, None, :]
    allowed = (store.pos >= 0)[:, :, None, :] & (distance >= 0)
    if step.window is not None:
        allowed = allowed & (distance < step.window)
    bias = None if store.bias is None else store.bias[:, :, None]
    return packed_queries(queries, kv_heads), allowed.repeat(1, 1, queries.shape[1] // kv_heads, 1), bias


# ------------------------------------------------------------------------------------ blocks of queries


def _blocks(step: Step, seen: Visible) -> list[tuple[int, int]]:
    """First and last query of each block, so that memory is bounded by the block, whatever the length."""
    (b, h, q, _), (kv_heads, n) = step.query.shape, seen.keys.shape[1:3]
    explicit = step.softcap is not None
    every_head = explicit or seen.bias is not None or seen.sight is not None
    per_query = b * n * (h if every_head else h // kv_heads * seen.pos.shape[1])
    block = max(1, min(q, (WEIGHT_ELEMENTS if explicit else MASK_ELEMENTS) // per_query))
    if q > 256 and seen.branch is None:
        block = min(block, max(128, q // 8))  # causal: early blocks need only early slots
    return [(first, min(q, first + block)) for first in range(0, q, block)]


def _attend_block(step: Step, seen: Visible, first: int, last: int) -> torch.Tensor:
    """Masked attention of the new tokens first .. last - 1: [B, H, x, D]."""
    b, h = step.query.shape[:2]
    kv_heads, n = seen.keys.shape[1:3]
    part = slice(0, n if seen.branch is not None else seen.old + last)
    if step.window is not None and seen.branch is None and not seen.old:  # positions decide among old slots
        part = slice(max(0, first - step.window + 1), part.stop)
    mask = visible(step, seen, first, last)[..., part].repeat(1, 1, h // kv_heads, 1)  # [B, 1 or K, G * x, slots]
    if seen.sight is not None:
        mask = mask & _in_sight(seen.sight, step.pos[:, first:last], seen.pos[:, :, part], h // kv_heads)
    packed = packed_queries(step.query[:, :, first:last], kv_heads)
    keys, values = seen.keys[:, :, part], seen.values[:, :, part]
    bias = None if seen.bias is None else seen.bias[:, :, None, part]
    if step.softcap is None:
        if bias is not None:
            mask = torch.where(mask, bias, float("-inf")).to(packed.dtype)
        out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=step.scaling)
    else:
        out = masked_weights(packed, keys, mask, step, bias).to(values.dtype) @ values
    return out.reshape(b, h, last - first, -1)


def visible(step: Step, seen: Visible, first: int, last: int) -> torch.Tensor:
    """Which slots the new tokens first .. last - 1 may see, sight aside: [B, 1 or K, x, N] bool."""
    query_slot = seen.old + torch.arange(first, last, device=seen.pos.device)  # [x]
    slots = torch.arange(seen.pos.shape[2], device=seen.pos.device)
    allowed = (slots <= query_slot[:, None]) & (seen.pos >= 0)[:, :, None, :]
    if step.window is not None:
        allowed = allowed & (step.pos[:, None, first:last, None] - seen.pos[:, :, None, :] < step.window)
    if seen.branch is not None:
        same = seen.branch[:, first:last, None] == seen.branch[:, None, :]  # [B, x, q]
        allowed[..., seen.old :] = allowed[..., seen.old :] & same[:, None]
    return allowed


def _in_sight(sight: Sight, pos: torch.Tensor, slot_pos: torch.Tensor, group: int) -> torch.Tensor:
    """Which slots each query head may see: [B, 1 or K, G * x, N], bool; pos [B, x], slot_pos [B, 1 or K, N]."""
    everything = torch.iinfo(torch.int32).max
    shape = (1, 1, 1, 1, 1) if len(sight.sinks) == 1 else (1, -1, group, 1, 1)
    sinks = to_device(sight.sinks, pos.device).view(shape)
    windows = to_device([everything if w is None else w for w in sight.windows], pos.device).view(shape)
    slots = slot_pos[:, :, None, None, :]
    seen = (slots < sinks) | (pos[:, None, None, :, None] - slots < windows)  # [B, 1 or K, 1 or G, x, N]
    return seen.expand(-1, -1, group, -1, -1).flatten(2, 3)


def new_weights(step: Step, seen: Visible, first: int, last: int) -> torch.Tensor:
    """Attention weights of the new tokens first .. last - 1 over the slots up to the last of them:
    [B, K, G * x, old + last] float32."""
    kv_heads, end = seen.keys.shape[1], seen.old + last
    mask = visible(step, seen, first, last)[..., :end].repeat(1, 1, step.query.shape[1] // kv_heads, 1)
    bias = None if seen.bias is None else seen.bias[:, :, None, :end]
    return masked_weights(
        packed_queries(step.query[:, :, first:last], kv_heads), seen.keys[:, :, :end], mask, step, bias
    )


def masked_weights(
    packed: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, step: Step, bias: torch.Tensor | None
) -> torch.Tensor:
    """Attention weights of packed queries [B, K, x, D] over [B, K, N, D], bias [B, K, 1, N]: [B, K, x, N] float32."""
    return _logits(packed, keys, mask, step, bias).softmax(dim=-1)


def _logits(
    packed: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, step: Step, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same before their softmax, minus infinity beyond the mask [B, 1 or K, x, N]."""
    scores = at_least_float32(packed @ keys.transpose(2, 3)).mul_(step.scaling)  # in place: these are large
    if step.softcap is not None:
        scores = torch.tanh(scores / step.softcap) * step.softcap
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill_(~mask, float("-inf"))

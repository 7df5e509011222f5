"""Attention that needs no mask: which kernel serves it, told from the arguments, and the kernels.

An explicit mask forbids the fast kernels, and none of these has one: nothing but the order of the tokens, and perhaps a
window of the newest slots, narrows what a query sees. No kernel of a CPU knows more of this than `is_causal` from the
first slot on; the others are made of it: parts are attended on their own and joined by the logarithms of their sums of
exponentials, which is exact.

Shapes: B rows, H query heads, K KV heads, q queries, the last q of N slots, D head size, W window, m blocks of it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from torch.nn.attention.bias import causal_lower_right

from kv_lm_eval.cache.transfer import to_device

Kernel = Literal["all", "causal", "parts", "tiles", "lower_right", "varlen", "masked"]
Part = tuple[torch.Tensor, torch.Tensor]  # attention [B, H, x, D] over some slots, and log-sum-exp [B, H, x]

TILE_TOKENS = 8192  # queries of a row whose slots are laid out in blocks at a time
_FLASH_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def choose(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, reach: int | None = None) -> Kernel:
    """The kernel for queries [B, H, q, D], those of the last q of N slots, keys and values [B, K, N, D].

    "all": one query sees every slot. "causal": no slot is older than the queries. "parts", "tiles": on a CPU, older
    slots and a window. "lower_right": torch's own name for older slots, which reaches flash on CUDA in half precision
    and the memory-efficient kernel in float32. "varlen": flash with a window. "masked": none of them.

    Args:
        reach: slots that a query sees, its own and those before it; None: all.
    """
    q, n = query.shape[2], keys.shape[2]
    windowed = reach is not None and reach < n
    if q == 1:
        return "all"
    if n == q and not windowed:
        return "causal"
    if query.shape[3] != values.shape[3]:
        return "masked"
    if query.device.type == "cpu" and _FLASH_CPU is not None:
        return "tiles" if windowed else "parts"
    if query.device.type == "cuda":
        if not windowed:
            return "lower_right"
        return "varlen" if _flash_takes(query) else "masked"
    return "masked"


def _flash_takes(query: torch.Tensor) -> bool:
    """Whether flash on CUDA serves queries [B, H, q, D] of this type and size on this device."""
    half, d = query.dtype in (torch.float16, torch.bfloat16), query.shape[3]
    return half and d <= 256 and d % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def unmasked(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, reach: int | None = None
) -> torch.Tensor | None:
    """Attention [B, H, q, D] by the kernel that `choose` names, with its arguments; None: there is none without a mask.

    Args:
        scale: of the logits.
    """
    kernel = choose(query, keys, values, reach)
    if kernel == "masked":
        return None
    if reach is not None and keys.shape[2] > (most := reach - 1 + query.shape[2]):
        keys, values = keys[:, :, -most:], values[:, :, -most:]
    if kernel == "all":
        packed = packed_queries(query, keys.shape[1])
        return F.scaled_dot_product_attention(packed, keys, values, scale=scale).reshape(*query.shape[:3], -1)
    if kernel == "causal":
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
    if kernel == "parts":
        return _lower_right(query, keys, values, scale)[0].to(query.dtype)
    if kernel == "tiles":
        assert reach is not None
        return _tiles(query, keys, values, scale, reach)
    if kernel == "lower_right":
        return _torch_lower_right(query, keys, values, scale)
    return _varlen(query, keys, values, scale, reach)


def packed_queries(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, H, q, D] -> [B, K, G * q, D]: the query heads of a group become queries of their KV head."""
    b, h, q, d = query.shape
    return query.reshape(b, kv_heads, h // kv_heads * q, d)


# ------------------------------------------------------------------------------------ CPU: parts joined


def whole(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> Part:
    """Every query [B, H, q, D] over every slot [B, K, N, D]."""
    assert _FLASH_CPU is not None
    out, lse = _FLASH_CPU(packed_queries(query, keys.shape[1]), keys, values, 0.0, False, scale=scale)
    return out.reshape(*query.shape[:3], -1), lse.reshape(query.shape[:3])


def causal(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> Part:
    """Each query [B, H, q, D] over the slots [B, K, q, D] up to its own."""
    assert _FLASH_CPU is not None
    out, lse = _FLASH_CPU(query, keys, values, 0.0, True, scale=scale)
    return out, lse


def joined(one: Part, other: Part) -> Part:
    """Attention over the slots of both, [B, H, x, D], in the type of the logarithms, and log-sum-exp."""
    weight = torch.sigmoid(one[1] - other[1]).unsqueeze(-1)
    out = torch.lerp(other[0].to(weight.dtype), one[0].to(weight.dtype), weight)
    return out, torch.logaddexp(one[1], other[1])


def _lower_right(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> Part:
    """Queries [B, H, q, D] over the slots [B, K, N, D] up to their own: older ones, then their own."""
    old = keys.shape[2] - query.shape[2]
    own = causal(query, keys[:, :, old:], values[:, :, old:], scale)
    return joined(whole(query, keys[:, :, :old], values[:, :, :old], scale), own) if old else own


def _tiles(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """Queries [B, H, q, D], each over the newest W of the slots [B, K, N, D] up to its own: in blocks of W queries,
    over their own slots and the block before. Full ones behind a full one are rows of a batch."""
    q, old = query.shape[2], keys.shape[2] - query.shape[2]
    parts = [_tile(query[:, :, :window], keys[:, :, : old + window], values[:, :, : old + window], scale, window)]
    done, step = window, window * max(1, TILE_TOKENS // window)
    while done + window <= q:
        end = min(done + step, q // window * window)
        k, v = (t[:, :, old + done - window : old + end] for t in (keys, values))
        parts.append(_full_tiles(query[:, :, done:end], k, v, scale, window))
        done = end
    if done < q:
        first = old + done - (window - 1)
        parts.append(_tile(query[:, :, done:], keys[:, :, first:], values[:, :, first:], scale, window))
    return torch.cat(parts, dim=2)


def _full_tiles(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """The same for m W queries [B, H, m W, D] behind W older slots, [B, K, (m + 1) W, D]: blocks are rows."""
    m = query.shape[2] // window
    own, *blocks = (x.unflatten(2, (-1, window)) for x in (query, keys, values))
    both = (torch.cat([x[:, :, :-1, 1:], x[:, :, 1:]], dim=3) for x in blocks)  # [B, K, m, 2 W - 1, D]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (own, *both))
    return _tile(q, k, v, scale, window).unflatten(0, (-1, m)).transpose(1, 2).flatten(2, 3)


def _tile(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """The same for at most W queries [B, H, x, D] behind at most W - 1 older slots of [B, K, N, D]."""
    x = query.shape[2]
    old = keys.shape[2] - x
    out, lse = causal(query, keys[:, :, old:], values[:, :, old:], scale)
    if not old:
        return out
    k, v = keys[:, :, :old], values[:, :, :old]
    near = min(x, window - 1 - old)  # queries that see every older slot
    some = min(x, window - 1) - near  # those after them, of which each sees one less than the one before it
    seen: list[Part] = []
    if near:
        seen.append(whole(query[:, :, :near], k, v, scale))
    if some:  # back to front, what they see is what is causal
        turned = _lower_right(query[:, :, near : near + some].flip(2), k.flip(2), v.flip(2), scale)
        seen.append((turned[0].flip(2), turned[1].flip(2)))
    older = torch.cat([part[0].to(lse.dtype) for part in seen], 2), torch.cat([part[1] for part in seen], 2)
    with_older = joined(older, (out[:, :, : near + some], lse[:, :, : near + some]))[0]
    return torch.cat([with_older.to(out.dtype), out[:, :, near + some :]], dim=2)


# ------------------------------------------------------------------------------------ CUDA: kernels that know it


def _torch_lower_right(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Queries [B, H, q, D] over the slots [B, K, N, D] up to their own, by torch's choice of kernel."""
    group = query.shape[1] // keys.shape[1]
    if group > 1 and query.dtype not in (torch.float16, torch.bfloat16):  # not flash: the other one wants equal heads
        keys, values, group = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1), 1
    order = causal_lower_right(query.shape[2], keys.shape[2])
    out: torch.Tensor = F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=order,  # a name, not a tensor of so many elements
        scale=scale,
        enable_gqa=group > 1,
    )
    return out


def _varlen(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, reach: int | None
) -> torch.Tensor:
    """Queries [B, H, q, D] over the newest slots [B, K, N, D] up to their own, all rows in one launch."""
    b, h, q, _ = query.shape
    n = keys.shape[2]
    ends_q, ends_k = (to_device(range(0, (b + 1) * size, size), query.device).to(torch.int32) for size in (q, n))
    packed = [x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (query, keys, values)]
    window = (-1 if reach is None else reach - 1, 0)
    out = varlen.varlen_attn(
        packed[0],
        packed[1],
        packed[2],
        ends_q,
        ends_k,
        q,
        n,
        scale=scale,
        window_size=window,
        enable_gqa=h != keys.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out.view(b, q, h, -1).transpose(1, 2)

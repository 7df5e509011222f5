"""Attention that is counted: what every slot receives from the new queries, beside their outputs.

Where weights are needed anyway they are made once, and outputs and sums both come from them: a kernel that hides them,
and a second reading of the keys for the sums, take nearly twice as long.

Shapes: B rows, H query heads, K KV heads, G = H / K, q new tokens, x queries of a block, N slots, D head size.
"""

from __future__ import annotations

import torch

from kv_lm_eval.cache.attention import WEIGHT_ELEMENTS, Step, Visible, attend, hidden_from_one, new_weights
from kv_lm_eval.cache.kernels import packed_queries
from kv_lm_eval.cache.transfer import at_least_float32

PACKED = 256  # queries of a block, those of all heads of a group counted
LEAST = 16  # of a block whose weights are of all heads at once
NEAR_ELEMENTS = 2**18  # weights made at a time on a CPU, where several heads' are no more: they stay near the processor


def attend_counted(step: Step, seen: Visible) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all new tokens, [B, H, q, D], and what each slot receives, mean over the query heads of a group:
    [B, K, N] float32."""
    if step.tokens == 1 and seen.sight is None and step.softcap is None:
        return attend_one(step, seen)
    if not seen.whole:
        return attend(step, seen), _received(step, seen)
    if step.query.dtype in (torch.float32, torch.float64):
        return _by_heads(step, seen, outputs=True)
    return attend(step, seen), _by_heads(step, seen, outputs=False)[1]  # weights in half precision lose more


def received_mass(step: Step, seen: Visible) -> torch.Tensor:
    """What each slot receives from the new tokens, [B, K, N] float32, where their outputs are known."""
    return _by_heads(step, seen, outputs=False)[1] if seen.whole else _received(step, seen)


def attend_one(step: Step, seen: Visible) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for one new token a row, [B, H, 1, D] and [B, K, N], from one reading of the keys, whatever is hidden
    but by a sight."""
    kv_heads = seen.keys.shape[1]
    logits = at_least_float32(packed_queries(step.query, kv_heads) @ seen.keys.transpose(2, 3)).mul_(step.scaling)
    if seen.bias is not None:
        logits += seen.bias.unsqueeze(2)
    if not seen.whole or seen.reach is not None:
        logits.masked_fill_(hidden_from_one(step, seen).unsqueeze(2), float("-inf"))
    weights = logits.softmax(-1)  # [B, K, G, N]
    out = (weights.to(seen.values.dtype) @ seen.values).reshape(*step.query.shape[:2], 1, -1)
    return out, weights.mean(2)


def _received(step: Step, seen: Visible) -> torch.Tensor:
    """What each slot receives, [B, K, N] float32, whatever is hidden."""
    b, h, q, _ = step.query.shape
    kv_heads, n = seen.keys.shape[1], seen.keys.shape[2]
    block = max(LEAST, min(q, 128, WEIGHT_ELEMENTS // (b * h * n)))
    mass = at_least_float32(step.query.new_zeros(0)).new_zeros(b, kv_heads, n)
    for first in range(0, q, block):
        last = min(q, first + block)
        mass[:, :, : seen.old + last] += new_weights(step, seen, first, last).sum(2)
    return mass / (h // kv_heads)


def _by_heads(step: Step, seen: Visible, outputs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Where nothing but order and a window hides slots: outputs, empty unless asked for, and what each slot receives.

    A few KV heads and PACKED queries at a time, each over the slots that one of them sees: blocks stay as they are,
    however long the text.
    """
    b, h, q, _ = step.query.shape
    kv_heads, n = seen.keys.shape[1:3]
    group, device = h // kv_heads, step.query.device
    x = min(q, max(1, PACKED // group))
    near = NEAR_ELEMENTS if device.type == "cpu" else WEIGHT_ELEMENTS
    some = max(1, min(b * kv_heads, near // (group * x * n)))
    queries = step.query.detach().reshape(b * kv_heads, group, q, -1)
    keys, values = (
        t.detach().flatten(0, 1) if b == 1 else t.detach().reshape(b * kv_heads, n, -1)
        for t in (seen.keys, seen.values)
    )
    out = values.new_empty(b * kv_heads, group, q if outputs else 0, values.shape[2])
    wide = at_least_float32(queries[:0]).dtype
    mass = keys.new_zeros(b * kv_heads, n, dtype=wide)
    logits = keys.new_empty(some * group * x * n, dtype=wide)
    weights = logits if device.type == "cpu" else torch.empty_like(logits)  # in their place, where that is known to do
    nothing = logits.new_zeros(1)
    for first in range(0, q, x):
        last = min(q, first + x)
        low, end = max(0, seen.old + first + 1 - (seen.reach or n)), seen.old + last
        own = seen.old + first if seen.reach is None else low  # before it, all of them see all
        hidden = _hidden(step, seen, (first, last), (own, end)).repeat(group, 1)
        for head in range(0, b * kv_heads, some):
            heads = slice(head, min(b * kv_heads, head + some))
            packed = queries[heads, :, first:last].flatten(1, 2)
            shape = (packed.shape[0], packed.shape[1], end - low)
            room, into = (t[: shape[0] * shape[1] * shape[2]].view(shape) for t in (logits, weights))
            part = keys[heads, low:end].transpose(1, 2)
            if wide == packed.dtype:
                torch.baddbmm(nothing, packed, part, beta=0, alpha=step.scaling, out=room)
            else:
                torch.mul(packed @ part, step.scaling, out=room)
            if step.softcap is not None:
                room.div_(step.softcap).tanh_().mul_(step.softcap)
            room[:, :, own - low :].masked_fill_(hidden, float("-inf"))
            torch.softmax(room, -1, out=into)
            mass[heads, low:end] += into.sum(1)
            if outputs:
                out[heads, :, first:last] = (into @ values[heads, low:end]).unflatten(1, (group, -1))
    return out.view(b, h, *out.shape[2:]), mass.view(b, kv_heads, n) / group


def _hidden(step: Step, seen: Visible, queries: tuple[int, int], slots: tuple[int, int]) -> torch.Tensor:
    """Which of the slots low .. end - 1 each of the queries first .. last - 1 does not see: [x, end - low] bool."""
    device = step.query.device
    behind = torch.arange(seen.old + queries[0], seen.old + queries[1], device=device)[:, None]
    behind = behind - torch.arange(*slots, device=device)
    return (behind < 0) | (behind >= (seen.reach or seen.keys.shape[2]))

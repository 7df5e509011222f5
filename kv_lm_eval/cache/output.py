"""What a layer's output projection makes of values: attention mixes values, the projection decides what that weighs.

Shapes: B batch rows, H query heads, K KV heads, G = H / K, N slots, D head size, M width of the model.
"""

from __future__ import annotations

import torch
from torch import nn

from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.transfer import at_least_float32

ELEMENTS = 2**24  # projected numbers held at a time
WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # formats in which a linear module multiplies


def output_norms(facts: ModelFacts, layer: int, values: torch.Tensor) -> torch.Tensor:
    """L1 norms of values [B, K, N, D] behind each query head's part of the layer's output projection, mean over the
    group: [B, K, N] float32. As much work as the projection of so many tokens."""
    b, k, n, d = values.shape
    heads = facts.heads[layer][0]
    matrix = matrix_of(facts.outputs[layer], heads * d, values).view(k, heads // k, d, -1)  # [K, G, D, M]
    out = at_least_float32(values.new_zeros(0)).new_zeros(b, k, n)
    block = max(1, ELEMENTS // (b * matrix.shape[-1]))
    for first in range(0, n, block):
        part = values[:, :, first : first + block]
        for head in range(k):
            for own in matrix[head]:
                out[:, head, first : first + block] += (part[:, head] @ own).abs_().sum(-1, dtype=out.dtype)
    return out / (heads // k)


def matrix_of(module: nn.Module, inputs: int, like: torch.Tensor) -> torch.Tensor:
    """[inputs, M] what a linear module makes of each of its inputs, without its bias, in the format of `like`."""
    weight = getattr(module, "weight", None)
    if type(module) is nn.Linear and weight is not None and weight.device == like.device:
        plain: torch.Tensor = weight.detach().t().to(like.dtype)
        return plain
    taken = weight.dtype if weight is not None and weight.dtype in WIDE else like.dtype  # not the form of a code
    one = torch.eye(inputs, dtype=taken, device=like.device)
    made: torch.Tensor = module(one) - module(torch.zeros_like(one[:1]))
    return made.to(like.dtype)

"""What tokens that are read a second time attend to.

Shapes: B rows, H query heads, K KV heads, G = H / K, q new tokens, n slots of a part, D head size, M width of a model.
"""

from __future__ import annotations

import torch

from kv_lm_eval.cache.attention import WEIGHT_ELEMENTS, Step, Visible, new_weights
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.output import matrix_of
from kv_lm_eval.cache.received import LEAST, NEAR_ELEMENTS
from kv_lm_eval.cache.store import rows_of
from kv_lm_eval.cache.transfer import at_least_float32


def strongest_attention(
    step: Step, seen: Visible, part: slice, sinks: int, effect: torch.Tensor | None = None
) -> torch.Tensor:
    """Largest attention that each of the n old slots of a part receives from any new query of its group, [B, K, n]
    float32, where the queries see nothing but the row's first `sinks` tokens, the part, and each other.

    Args:
        effect: [B, K, G, n], times which attention counts, over the norm of what each query was made of; or None.
    """
    b, h, q, _ = step.query.shape
    pos = seen.pos
    first = (pos < 0).sum(-1, keepdim=True) + torch.arange(sinks, device=pos.device)  # empty slots are the first ones
    index = first.clamp_max(part.start)
    there = (first < part.start) & (pos.gather(2, index) < sinks)
    sink_pos = pos.gather(2, index).masked_fill(~there, -1)
    keys = torch.cat([rows_of(seen.keys, index), seen.keys[:, :, part], seen.keys[:, :, seen.old :]], dim=2)
    old, n = sinks + part.stop - part.start, part.stop - part.start
    some = Visible(
        keys, keys[..., :0], torch.cat([sink_pos, pos[:, :, part], pos[:, :, seen.old :]], dim=2), old, False
    )
    kv_heads, near = keys.shape[1], step.query.device.type == "cpu"
    heads = 1 if near else kv_heads  # at a time: on a CPU weights stay near the processor
    group, most = h // kv_heads, NEAR_ELEMENTS if near else WEIGHT_ELEMENTS
    block = max(LEAST, min(q, 256, most // (b * heads * group * (old + q))))
    found = at_least_float32(step.query.new_zeros(0)).new_zeros(b, kv_heads, n)
    for head in range(0, kv_heads, heads):
        own = slice(head, head + heads)
        part_of = some._replace(keys=keys[:, own], pos=some.pos[:, own] if some.pos.shape[1] > 1 else some.pos)
        queries = step._replace(query=step.query[:, head * group : (head + heads) * group])
        for at in range(0, q, block):
            end = min(q, at + block)
            weights = new_weights(queries, part_of, at, end)[..., sinks:old]
            if effect is not None:
                assert step.hidden is not None
                norms = at_least_float32(step.hidden[:, at:end]).norm(dim=-1).to(weights.device)
                weights = weights.unflatten(2, (group, end - at)) / norms[:, None, None, :, None]
                weights = (weights * effect[:, own].unsqueeze(3)).flatten(2, 3)
            found[:, own] = torch.maximum(found[:, own], weights.amax(2))
    return found


def effects(facts: ModelFacts, layer: int, values: torch.Tensor) -> torch.Tensor:
    """Length of what the layer's output projection makes of values [B, K, n, D] behind each query head's part of it:
    [B, K, G, n] float32."""
    k, d = values.shape[1], values.shape[3]
    heads = facts.heads[layer][0]
    matrix = at_least_float32(matrix_of(facts.outputs[layer], heads * d, values)).view(k, heads // k, d, -1)
    gram = matrix @ matrix.transpose(2, 3)  # [K, G, D, D]
    each = at_least_float32(values).unsqueeze(2)
    return ((each @ gram) * each).sum(-1).clamp_min(0).sqrt()

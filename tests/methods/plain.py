"""What a stock model computes for one row, layer by layer in float64, for references written as plain loops.

Queries come from the model's own projections and are rotated by matrices written from the definition; nothing of the
package takes part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tiny
import torch
import transformers as tf
from methods.rotary import rotation, unrotated_queries
from methods.test_kept_sets import best, held_by

NAMES = ("llama", "gpt_neox")
LENGTHS = (60, 41, 24)  # of the rows of a padded batch
Vector = list[float]


@dataclass
class Layer:
    """One layer of one row. Queries [H][n][D] and keys [K][n][D] as they meet, pre [K][n][D] before their rotation,
    values [K][n][D], out [H][D][M] the part of the output projection that each query head is multiplied by."""

    queries: list[list[Vector]]
    keys: list[list[Vector]]
    pre: list[list[Vector]]
    values: list[list[Vector]]
    out: torch.Tensor
    weights: list[list[Vector]]  # [H][query][key], causal

    @property
    def n(self) -> int:
        return len(self.keys[0])

    @property
    def kv_heads(self) -> range:
        return range(len(self.keys))

    def group(self, kv_head: int) -> range:
        """The query heads that read a KV head."""
        size = len(self.queries) // len(self.keys)
        return range(kv_head * size, (kv_head + 1) * size)

    def logit(self, head: int, query: int, key: int, scale: float | None = None) -> float:
        own = self.keys[head // (len(self.queries) // len(self.keys))][key]
        size = len(own) ** -0.5 if scale is None else scale
        return dot(self.queries[head][query], own) * size

    def projected(self, kv_head: int, token: int) -> float:
        """Mean over the group of the sum of absolute values of W v."""
        value = torch.tensor(self.values[kv_head][token], dtype=torch.float64)
        sums = [sum(abs(x) for x in (value @ self.out[head]).tolist()) for head in self.group(kv_head)]
        return sum(sums) / len(sums)


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Sequence[float]) -> float:
    return math.sqrt(dot(a, a))


def softmax(logits: Sequence[float]) -> Vector:
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    return [p / sum(powers) for p in powers]


def pooled(scores: Sequence[float], kernel: int, pooling: str) -> Vector:
    """Over neighbours; the average counts places beyond the ends as 0."""
    half, out = kernel // 2, []
    for t in range(len(scores)):
        near = scores[max(0, t - half) : t + half + 1]
        out.append(max(near) if pooling == "max" else sum(near) / kernel)
    return out


@functools.cache
def layers(name: str, row: tuple[int, ...]) -> list[Layer]:
    model = tiny.build(name).double()
    config, n = model.config, len(row)
    cache = tf.DynamicCache(config=config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([list(row)]), **tiny.given(cache), use_cache=True)
    turns = torch.stack([rotation(config, p) for p in range(n)])
    maps = [m.weight.T for path, m in model.named_modules() if path.endswith(("o_proj", "attention.dense"))]
    out = []
    for own, bare, matrix in zip(cache.layers, unrotated_queries(model, list(row)), maps, strict=True):
        queries = torch.einsum("nij,hnj->hni", turns, bare)
        keys, values = own.keys[0], own.values[0]
        group = len(queries) // len(keys)
        logits = queries @ keys.repeat_interleave(group, 0).transpose(1, 2) * keys.shape[2] ** -0.5
        weights = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
        pre = torch.einsum("nji,knj->kni", turns, keys)  # turned back
        parts = matrix.detach().reshape(len(queries), keys.shape[2], -1)
        lists = (x.tolist() for x in (queries, keys, pre, values))
        out.append(Layer(*lists, parts, weights.tolist()))
    return out


def choose(scores: Sequence[float], count: int) -> set[int]:
    return best(dict(enumerate(scores)), count)


def compare(
    name: str,
    settings: dict[str, object],
    reference: Callable[[Layer], list[set[int]]],
    lengths: Sequence[int] = LENGTHS,
) -> None:
    """Every row of a padded batch keeps, in every layer, what the reference says: sets by KV head."""
    pair, rows = tiny.pair(name), [tiny.tokens(n, seed=n) for n in lengths]
    cache = pair.cache(**settings)
    tiny.forward(pair.model, cache, rows)
    for i, row in enumerate(rows):
        expected = [reference(layer) for layer in layers(name, tuple(row))]
        got = held_by(cache, i)
        wide = [own * (len(want) // len(own)) for own, want in zip(got, expected, strict=True)]
        assert wide == expected, f"row of {len(row)} tokens"


def later_cuts(
    name: str,
    settings: dict[str, object],
    scores: Callable[[Layer, int, list[int]], Sequence[float]],
    ada: bool = False,
    every: int = 5,
) -> None:
    """Cuts that go on while 20 tokens are fed one by one, of what each head still holds.

    Only the first layer is looked at, whose keys, values and queries do not depend on what was evicted.

    Args:
        scores: of one KV head's tokens at these positions. ada: the best of all heads stay, however many each has.
    """
    sharing = {"head_budget": "ada", "alpha": 0} if ada else {}
    pair, row, slots = tiny.pair(name), tiny.tokens(60, seed=60), int(str(settings["max_capacity_prompt"]))
    cache = pair.cache(**{**settings, **sharing}, compress_every=every)
    tiny.forward(pair.model, cache, [row[:40]])
    layer, uneven = layers(name, tuple(row))[0], False

    def cut(held: list[list[int]]) -> list[set[int]]:
        every_head = [scores(layer, head, at) for head, at in enumerate(held)]
        if not ada:
            return [{at[i] for i in choose(own, slots)} for at, own in zip(held, every_head, strict=True)]
        ranked = sorted((-s, h, held[h][i]) for h, own in enumerate(every_head) for i, s in enumerate(own))
        return [{t for _, h, t in ranked[: slots * len(held)] if h == head} for head in range(len(held))]

    kept = cut([list(range(40)) for _ in layer.kv_heads])
    for start in range(40, 60, every):
        assert tiny.kept(cache, 0) == [sorted(head) for head in kept], f"{start} tokens seen"
        for t in range(start, start + every):
            tiny.forward(pair.model, cache, [[row[t]]], starts=[t])
        kept = cut([sorted(head | set(range(start, start + every))) for head in kept])
        uneven = uneven or len(set(map(len, kept))) > 1
    assert tiny.kept(cache, 0) == [sorted(head) for head in kept]
    assert uneven or not ada, "heads hold as many, and none has empty slots"

"""What each attention head looks at, from the model's own attention weights over a text of any length.

The weights are computed again from the queries and keys of each layer in blocks of queries, so that no length-squared
tensor of all heads ever exists; every number is a mean over queries.

Reference: cny123222/LLM-Efficient-Reasoning@95e336b, attention_analyzer.py.
Deviations: means are over queries, not over means of chunks; `recent` is the last tenth of what each query sees, not of
the chunk's columns (which most queries cannot see); chunks may be as long as the model allows, not 512 tokens.

Shapes: L layers, H query heads, K KV heads, G = H / K, x queries of a block, N keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.attention import WEIGHT_ELEMENTS, Step, Visible, new_weights, visible
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.cache.transfer import sum_dtype
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.engine.prefill import feed
from kv_lm_eval.methods.compression import Compression

SINKS = 4  # first tokens that count as sinks
LOCAL = 8  # local: the query's own token and so many before it
DISTANCES = 64  # distances of the histogram, from 0
BLOCK = 128  # queries at a time, at most: early ones need only early keys
EPSILON = 1e-10  # added inside logarithms


@dataclass
class HeadStatistics:
    """One query head; means over all queries. Shares are of the attention, entropies in nats.

    Attributes:
        entropy, entropy_std: of the weights, mean and standard deviation over queries.
        max_weight: the largest weight.
        sink: share on the first 4 tokens. local: on the query's own token and the 8 before it. recent: on the last
            tenth of what the query sees. far: what sink and local leave ("global" in the original).
        uniformity: Kullback-Leibler divergence from equal weights; near 0: uniform.
        distances: share at each distance from 0 to 63.
    """

    layer: int
    head: int
    entropy: float = 0.0
    entropy_std: float = 0.0
    max_weight: float = 0.0
    sink: float = 0.0
    local: float = 0.0
    recent: float = 0.0
    far: float = 0.0
    uniformity: float = 0.0
    distances: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, rounded to what is meant."""
        out = asdict(self)
        out["distances"] = [round(share, 6) for share in self.distances]
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in out.items()}


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    facts: ModelFacts,
    chunks: Sequence[Sequence[int]],
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[list[HeadStatistics]]:
    """Statistics of every head, by layer, over rows of tokens that are each read alone from position 0.

    Args:
        model: under our attention (`wrap`). chunks: token rows, at least two tokens each.
        progress: called with the number of tokens of each chunk.
    """
    assert chunks and all(len(chunk) > 1 for chunk in chunks)
    sums = [LayerSums(*facts.heads[layer]) for layer in range(facts.num_layers)]
    for chunk in chunks:
        cache = CompressedCache(FULL, facts, partial(_Observer, sums=sums))
        cache.set(mode="hold")
        feed(model, cache, [chunk], keep=1)
        progress(len(chunk))
    return [layer_sums.statistics(layer) for layer, layer_sums in enumerate(sums)]


class _Observer(Segment):
    """A row whose layers' attention weights are looked at on the way."""

    def __init__(self, compression: Compression, facts: ModelFacts, sums: list[LayerSums]) -> None:
        super().__init__(compression, facts)
        self.sums = sums

    def attend(self, step: Step) -> torch.Tensor:
        self.sums[step.layer].add(step)
        return super().attend(step)


class LayerSums:
    """Sums over the queries of one layer, in float64.

    Attributes:
        queries: how many; compared: how many of them see at least two keys (one key is always uniform).
        scalars: [7, H] entropy, its square, largest weight, sink, local, recent, divergence. distances: [DISTANCES, H].
    """

    def __init__(self, num_heads: int, num_kv_heads: int) -> None:
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.queries = self.compared = 0
        self.scalars = torch.zeros(7, num_heads, dtype=torch.float64)
        self.distances = torch.zeros(DISTANCES, num_heads, dtype=torch.float64)

    def add(self, step: Step) -> None:
        """Adds the queries of one forward over a sequence of its own, from position 0: query, key [1, heads, n, D]."""
        n = step.tokens
        own = Visible(step.key, step.value, step.pos[:, None], old=0, whole=False)
        block = max(1, min(BLOCK, WEIGHT_ELEMENTS // (self.num_heads * n)))
        for first in range(0, n, block):
            last = min(n, first + block)
            weights = new_weights(step, own, first, last)
            mask = visible(step, own, first, last)[0, 0, :, :last]
            self._add_weights(weights.view(self.num_heads, last - first, last), mask, first)

    def _add_weights(self, weights: torch.Tensor, mask: torch.Tensor, first: int) -> None:
        """weights [H, x, N] of the queries at positions first .. first + x - 1 over positions 0 .. N - 1; mask [x, N]
        says which keys each sees."""
        device, wide = weights.device, sum_dtype(weights.device)
        query = torch.arange(first, first + weights.shape[1], device=device)[:, None]
        key = torch.arange(weights.shape[2], device=device)[None, :]
        count = mask.sum(1)
        logs = (weights + EPSILON).log()
        entropy = -(weights * logs).sum(-1)
        divergence = (weights * (logs - (1 / count[:, None] + EPSILON).log())).sum(-1) * (count > 1)
        rows = (
            entropy,
            entropy.square(),
            weights.amax(-1),
            weights[:, :, :SINKS].sum(-1),
            (weights * (query - key <= LOCAL)).sum(-1),
            (weights * (query - key < (count[:, None] + 9) // 10)).sum(-1),
            divergence,
        )
        self.scalars += torch.stack([row.to(wide).sum(-1) for row in rows]).cpu()
        near = query - torch.arange(DISTANCES, device=device)  # [x, DISTANCES] positions of the keys at each distance
        at = weights.gather(2, near.clamp(0, weights.shape[2] - 1).expand(self.num_heads, -1, -1))
        self.distances += (at * (near >= 0)).to(wide).sum(1).T.cpu()
        self.queries += len(query)
        self.compared += int((count > 1).sum())

    def statistics(self, layer: int) -> list[HeadStatistics]:
        """The means, one entry a head."""
        means, near = (self.scalars / self.queries).tolist(), (self.distances / self.queries).T.tolist()
        entropy, squares, largest, sink, local, recent, _ = means
        divergence = (self.scalars[6] / max(self.compared, 1)).tolist()
        return [
            HeadStatistics(
                layer,
                head,
                entropy=entropy[head],
                entropy_std=max(0.0, squares[head] - entropy[head] ** 2) ** 0.5,
                max_weight=largest[head],
                sink=sink[head],
                local=local[head],
                recent=recent[head],
                far=max(0.0, 1 - sink[head] - local[head]),
                uniformity=divergence[head],
                distances=near[head],
            )
            for head in range(self.num_heads)
        ]

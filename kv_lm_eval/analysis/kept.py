"""One prompt under one method: which tokens each head keeps, the attention that they would have had, what it costs.

The attention is the full cache's: of the queries that write its answer (the prompt's last token and the answer's own)
over the prompt. So a token's share says how much the answer looks at it where it is there, and the shares of the tokens
that a head keeps add up to the attention mass kept.

Shapes: L layers, H query heads, K KV heads, T tokens of the prompt, n tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kv_lm_eval.cache.attention import Step, Visible, new_weights
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.cache.view import AskedOfCompression, Sight
from kv_lm_eval.engine.check import FULL
from kv_lm_eval.engine.fidelity import continue_beside, full_cache
from kv_lm_eval.engine.lent import our_attention
from kv_lm_eval.engine.prefill import feed, forward
from kv_lm_eval.metrics.divergence import Divergence
from kv_lm_eval.metrics.report import Report
from kv_lm_eval.serving.served import Served


@dataclass
class Kept:
    """What came out.

    Attributes:
        kept: [heads, T] bool of each layer; heads are KV heads, or query heads where the method keeps pairs for each.
        shares: [heads, T] attention of each layer, as above; rows add up to less than 1, the answer has the rest.
        answer, full_answer: token ids, under the method and under the full cache.
        beside: the full answer's tokens under both. report: of the cache after the method's answer.
    """

    kept: list[torch.Tensor]
    shares: list[torch.Tensor]
    answer: list[int]
    full_answer: list[int]
    beside: Divergence
    report: Report

    def mass_kept(self) -> list[list[float]]:
        """By layer and head: of the attention that the full answer pays to the prompt, the share on tokens kept."""
        pairs = zip(self.kept, self.shares, strict=True)
        return [((share * kept).sum(1) / share.sum(1)).tolist() for kept, share in pairs]


def look(served: Served, prompt: Sequence[int], most_new: int, pad: int) -> Kept:
    """Runs the prompt under the method and under the full cache; answers are greedy."""
    assert served.facts is not None
    ids = torch.tensor([list(prompt)], device=served.model.device)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": most_new, "pad_token_id": pad}
    call = {**call, "do_sample": False, "num_beams": 1}
    answer, full_answer = (
        served.answer(served.called.generate, call, cache)[0, len(prompt) :].tolist()
        for cache in (None, full_cache(served.facts))
    )
    with our_attention(served.model), torch.no_grad():
        kept = _kept(served, prompt)
        shares = _shares(served, prompt, full_answer)
        *_, beside = continue_beside(served.model, served.new_cache, [prompt], [[full_answer]], 0)
    grouped = [s.view(len(k), -1, len(prompt)).mean(1) for k, s in zip(kept, shares, strict=True)]
    return Kept(kept, grouped, answer, full_answer, beside[0][0], served.calls[0])


def _kept(served: Served, prompt: Sequence[int]) -> list[torch.Tensor]:
    """Of each layer, [heads, T] whether a token's pair is held, and seen, after the prompt."""
    cache = served.new_cache()
    feed(served.model, cache, [prompt], keep=1)
    found, (segment,) = [], cache.segments
    for layer, store in enumerate(segment.stores):
        held = torch.zeros(store.keys.shape[1], len(prompt) + 1, dtype=torch.bool)
        pos = store.pos[0].long().cpu().expand(len(held), -1)
        held.scatter_(1, torch.where(pos < 0, len(prompt), pos), True)
        sight = segment.compression.sight(layer) if segment.facts.compressible(layer) else None
        found.append(held[:, :-1] if sight is None else held[:, :-1] & _in_sight(sight, len(held), len(prompt)))
    return found


def _in_sight(sight: Sight, heads: int, tokens: int) -> torch.Tensor:
    """[heads, T] whether any query head of the group sees a token, from the place after the prompt."""
    place = torch.arange(tokens)
    sinks, windows = (list(x) * (heads if len(x) == 1 else 1) for x in (sight.sinks, sight.windows))
    near = [tokens + 1 if w is None else w for w in windows]
    seen = [(place < s) | (tokens - place < w) for s, w in zip(sinks, near, strict=True)]  # type: ignore[operator]
    return torch.stack(seen).view(heads, -1, tokens).any(1)


class _Watched(Segment):
    """The full cache, whose later queries' attention is noted: [H, T] by layer, mean over the queries."""

    def __init__(
        self, compression: AskedOfCompression, facts: ModelFacts, found: list[torch.Tensor], tokens: int
    ) -> None:
        super().__init__(compression, facts)
        self._found, self._tokens = found, tokens

    def _stored(self, step: Step) -> Visible:
        seen = super()._stored(step)
        if self.mode == "decode":
            q, h, n = step.tokens, step.query.shape[1], seen.keys.shape[2]
            total = torch.zeros(h, self._tokens + 1)
            pos = seen.pos[0, 0].long().cpu().clamp_max(self._tokens)
            for i in range(q):
                weights = new_weights(step, seen, i, i + 1)[0].float().cpu()  # [K, G, old + i + 1]
                total.index_add_(1, pos[: n - q + i + 1], weights.flatten(0, 1) / q)
            self._found.append(total[:, :-1])
        return seen


def _shares(served: Served, prompt: Sequence[int], answer: Sequence[int]) -> list[torch.Tensor]:
    """[H, T] of each layer: attention of the prompt's last token and the answer's, but for its last one, which asks
    for nothing."""
    found: list[torch.Tensor] = []
    assert served.facts is not None
    kind: Any = partial(_Watched, found=found, tokens=len(prompt))
    cache = CompressedCache(FULL, served.facts, kind)
    feed(served.model, cache, [prompt[:-1]], keep=1)
    forward(served.model, cache, [[prompt[-1], *answer[:-1]]], keep=1)
    return found

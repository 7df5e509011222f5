"""How much of the full cache's attention in a layer goes to pairs that a method has evicted: the lost attention mass.

The queries and keys are those of the full cache, which in the one layer that is compressed are the method's own too,
since nothing below it is. What the method's cache holds is noted as each forward begins: a query sees that and the new
tokens up to itself.

Shapes: n tokens, H heads, K KV heads, N slots, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from kv_lm_eval.cache.attention import Step
from kv_lm_eval.cache.band import Band
from kv_lm_eval.cache.cache import CompressedCache

BLOCK = 128  # queries at a time


@dataclass
class Seen:
    """What one text's two runs showed of a layer: the full cache's steps, and what the method's cache held."""

    layer: int
    steps: list[Step] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)  # [1 or K, q, n so far] bool of each forward
    known: bool = True  # whether what a query sees is what is held

    def note(self, cache: CompressedCache, step: Step) -> None:
        """Before a layer's attention."""
        if not cache.compression.method.compresses:
            self.steps.append(step)
            return
        (segment,), q = cache.segments, step.tokens
        done = sum(h.shape[1] for h in self.held)
        store = segment.stores[self.layer]
        self.known = self.known and cache.compression.sight(self.layer) is None
        t, tokens = torch.arange(done, done + q)[:, None], torch.arange(done + q)[None]
        if isinstance(segment, Band):
            low = segment.low[done : done + q, None].clamp_min(segment.sinks)
            inside = (tokens < segment.sinks) | (tokens >= low)
            self.held.append((inside & (tokens <= t))[None])
            return
        pos = None if store.is_empty else store.pos[0].cpu()  # [1 or K, N]
        old = torch.zeros(1 if pos is None else len(pos), done + q, dtype=torch.bool)
        for head, own in enumerate(pos if pos is not None else ()):
            old[head, own[own >= 0].long()] = True
        self.held.append(old[:, None] | ((tokens >= done) & (tokens <= t))[None])

    def mean(self) -> float | None:
        """The mean over queries and heads; None where it is not known."""
        if not self.known or not self.held or not self.steps:
            return None
        query, key = (torch.cat([getattr(s, name)[0] for s in self.steps], dim=1) for name in ("query", "key"))
        n = query.shape[1]
        heads = max(len(held) for held in self.held)
        seen = torch.zeros(heads, n, n, dtype=torch.bool)
        at = 0
        for held in self.held:
            stop = min(at + held.shape[1], n)
            seen[:, at:stop, : held.shape[2]] = held[:, : stop - at, :n]
            at = stop
        lost = 0.0
        for start in range(0, n, BLOCK):
            weights = _weights(self.steps[0], query[:, start : start + BLOCK], key, start)
            gone = ~seen[:, start : start + BLOCK].to(weights.device)
            lost += float((weights * gone.repeat_interleave(weights.shape[0] // heads, dim=0)).sum())
        return lost / (query.shape[0] * n)


def _weights(step: Step, query: torch.Tensor, key: torch.Tensor, start: int) -> torch.Tensor:
    """[H, x, n] of queries from token `start` on, [H, x, D], over all keys [K, n, D]."""
    keys = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    logits = (query.double() @ keys.double().transpose(1, 2)) * step.scaling
    if step.softcap is not None:
        logits = torch.tanh(logits / step.softcap) * step.softcap
    back = torch.arange(start, start + query.shape[1])[:, None] - torch.arange(key.shape[1])[None]
    allowed = (back >= 0) & (back < (step.window or key.shape[1] + 1))
    return logits.masked_fill(~allowed.to(logits.device), float("-inf")).softmax(-1)


@contextmanager
def watched(layer: int) -> Iterator[Seen]:
    """Inside, one text runs under a method and the full cache."""
    seen, original = Seen(layer), CompressedCache.attend

    def attend(self: CompressedCache, step: Step, mask: torch.Tensor | None) -> torch.Tensor:
        if step.layer == layer:
            seen.note(self, step)
        return original(self, step, mask)

    CompressedCache.attend = attend  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        CompressedCache.attend = original  # type: ignore[method-assign]

"""Streaming with sinks and a window, many tokens at a time, exactly: every query sees what it would have seen alone.

Where the kept tokens are always the first S and the most recent ones, the schedule is known before anything is run:
query t sees n_t slots, the sinks j < S and the tokens from t + 1 - (n_t - S) on. So a chunk of queries is one banded
attention. Keys keep their true positions. With in-cache numbering the sinks stand t + 1 - n_t places (the tokens
evicted so far) closer to query t than their true positions say; here the query is turned back by as much for the sinks
instead of moving them, and one softmax runs over both parts.

Shapes: B batch rows, H query heads, K KV heads, G = H / K, q new tokens, x queries of a block, N slots, S sinks,
D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kv_lm_eval.cache.attention import Step, packed_queries
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.cache.view import AskedOfCompression

BLOCK = 128  # queries attended at a time: memory and work are BLOCK x (window + BLOCK) a head, whatever the chunk
FAR = 32_768  # positions beyond this are brought back, so that float32 angles stay exact in streams without end


class Band(Segment):
    """Rows of documents from their first token on, under a policy that looks at positions alone.

    Args:
        compression: a method whose `sinks_and_recent` is not None, dropping what it evicts from every layer alike.
        slots: [T] int32, how many slots each query of the longest document sees, itself included.
        cuts: slots dropped after so many tokens were fed.
        prefill_tokens: tokens that are one forward of full attention with a cut after it, or all that a document has.
    """

    may_join = False
    serves = ("ring",)  # which pairs a query sees is the same, however they are stored

    def __init__(
        self,
        compression: AskedOfCompression,
        facts: ModelFacts,
        slots: torch.Tensor,
        cuts: dict[int, int],
        prefill_tokens: int = 0,
    ) -> None:
        super().__init__(compression, facts)
        sinks = compression.method.sinks_and_recent
        assert sinks is not None
        self.sinks = sinks
        self.slots, self.cuts, self.prefill_tokens = slots.long(), cuts, prefill_tokens
        self.low = torch.arange(1, len(slots) + 1) - (self.slots - sinks)  # first window token that query t sees
        self.base = 0  # true position minus the position that is fed, the same for all rows
        self.firsts: list[int] = []  # by layer, the token in the first slot after the sinks

    # ------------------------------------------------------------------------------------ what the engine asks

    def until_due(self, limit: int) -> int:
        return limit

    def next_positions(self) -> list[int]:
        return [seen - self.base for seen in self.seen]

    def _counts_of(self, rows: Sequence[int]) -> Segment:
        new = super()._counts_of(rows)
        assert isinstance(new, Band)
        new.firsts = list(self.firsts)
        return new

    def prepare(self, tokens: int) -> None:
        """Before a forward of so many tokens: brings the window's positions back if they would get too large."""
        start = self.seen[0]
        most = max(FAR, 2 * (int(self.slots.max()) + tokens))
        if not self._turns or start + tokens - self.base <= most:
            return
        first = self.firsts[self._cut_layers[0]]
        shift = first - self.base - self.sinks  # the oldest token that is still seen comes right after the sinks
        self.base += shift
        rope = self.facts.rope
        assert rope is not None
        for layer in self._cut_layers:
            keys = self.stores[layer].keys[:, :, self.sinks :]
            if self.facts.rotates(layer):
                keys.copy_(rope.rotate(keys, torch.full((1, 1), -shift, device=keys.device), layer))
        for layer, window in enumerate(self.facts.sliding_windows):
            if layer not in self._cut_layers and window is not None and self.facts.rotates(layer):
                keys = self.stores[layer].keys
                keys.copy_(rope.rotate(keys, torch.full((1, 1), -shift, device=keys.device), layer))

    @property
    def _cut_layers(self) -> list[int]:
        return [i for i in range(len(self.stores)) if self.facts.compressible(i)]

    @property
    def _turns(self) -> bool:
        """Whether sinks are numbered by their place in the cache."""
        return bool(self.compression.method.in_cache_sinks)

    # ------------------------------------------------------------------------------------ one layer

    def attend(self, step: Step) -> torch.Tensor:
        """[B, H, q, D]; the new pairs are stored, and what no later query sees is let go."""
        q, layer = step.query.shape[2], step.layer
        start, store = self.seen[0] - q, self.stores[layer]
        cut = self.facts.compressible(layer)
        sinks = self.sinks if cut else 0
        if not self.firsts:
            self.firsts = [self.sinks if self.facts.compressible(i) else 0 for i in range(len(self.stores))]
        store.append(step.key, step.value, step.pos.to(step.key.device))
        low = self._lowest(start, q + 1, step.window, cut)
        first = self.firsts[layer]
        turned, evicted = None, None
        if cut and self._turns and self.facts.rotates(layer):
            t = torch.arange(start, start + q)
            evicted = t - self.base + 1 - self.slots[start : start + q]
            if evicted.any():
                assert self.facts.rope is not None
                turned = self.facts.rope.rotate(step.query, -evicted.to(step.query.device)[None], layer)
        out = torch.empty(*step.query.shape[:3], step.value.shape[3], dtype=step.query.dtype, device=step.query.device)
        for a in range(0, q, BLOCK):
            b = min(q, a + BLOCK)
            t, some = torch.arange(start + a, start + b)[:, None], min(sinks, start + b)
            tokens = torch.arange(int(low[a]), max(int(low[a]), start + b))
            window = (tokens[None] >= low[a:b, None]) & (tokens[None] <= t)
            first_ones = torch.arange(some)[None]
            near = first_ones > t - step.window if step.window is not None else torch.ones(1, 1, dtype=torch.bool)
            visible = torch.cat([(first_ones <= t) & near, window], dim=1).to(step.query.device)
            begin = sinks + int(low[a]) - first
            part = [slice(0, some), slice(begin, begin + len(tokens))]
            keys = [store.keys[:, :, p] for p in part]
            values = torch.cat([store.values[:, :, p] for p in part], dim=2)
            out[:, :, a:b] = _banded(
                step.query[:, :, a:b], None if turned is None else turned[:, :, a:b], keys, values, visible, step
            )
        self._let_go(layer, int(low[q]))
        if layer == len(self.stores) - 1:
            self._count()
        return out

    def _lowest(self, start: int, count: int, window: int | None, cut: bool) -> torch.Tensor:
        """First token beside the sinks that each of `count` queries from `start` on sees."""
        t = torch.arange(start, start + count)
        low = torch.zeros(count, dtype=torch.long)
        if cut:
            known = self.low[start : start + count].clamp_min(self.sinks)
            low = torch.cat([known, known.new_full((count - len(known),), start)])  # after the end nothing is asked
        return low if window is None else torch.maximum(low, t - window + 1)

    def _let_go(self, layer: int, low: int) -> None:
        """Drops the slots between the sinks and token `low`."""
        store = self.stores[layer]
        sinks = self.sinks if self.facts.compressible(layer) else 0
        gone = min(low - self.firsts[layer], store.length - sinks)
        if gone > 0:
            store.drop_between(sinks, sinks + gone)
            self.firsts[layer] += gone

    def _count(self) -> None:
        """What a token-by-token run would hold now, and held at most."""
        for b, seen in enumerate(self.seen):
            if seen:
                slots: float = int(self.slots[seen - 1]) - self.cuts.get(seen, 0)
                if seen < self.prefill_tokens:  # its prefill ends where it ends
                    slots = self.compression.keep([seen], [seen], self._cut_layers[0], self._cut_layers)[0]
                self.peaks[b] = int(self.slots[:seen].max())
                for layer, window in enumerate(self.facts.sliding_windows):
                    cut = self.facts.compressible(layer)
                    self.held[layer][b] = slots if cut else min(seen, window or seen)


def _banded(
    query: torch.Tensor,
    turned: torch.Tensor | None,
    keys: list[torch.Tensor],
    values: torch.Tensor,
    visible: torch.Tensor,
    step: Step,
) -> torch.Tensor:
    """Attention of x queries over sinks and window, one softmax over both.

    Args:
        query: [B, H, x, D] for the window; turned: the same queries for the sinks, or None: as they are.
        keys: sinks [B, K, S, D] and window [B, K, N, D]; values: [B, K, S + N, D]. visible: [x, S + N].
    """
    b, h, x, _ = query.shape
    kv_heads = values.shape[1]
    mask = visible.repeat(h // kv_heads, 1)
    if turned is None and step.softcap is None:
        out = F.scaled_dot_product_attention(
            packed_queries(query, kv_heads), torch.cat(keys, dim=2), values, attn_mask=mask, scale=step.scaling
        )
        return out.reshape(b, h, x, -1)
    for_sinks = query if turned is None else turned
    scores = torch.cat(
        [
            packed_queries(for_sinks, kv_heads) @ keys[0].transpose(2, 3),
            packed_queries(query, kv_heads) @ keys[1].transpose(2, 3),
        ],
        dim=3,
    )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * step.scaling
    if step.softcap is not None:
        scores = torch.tanh(scores / step.softcap) * step.softcap
    weights = scores.masked_fill_(~mask, float("-inf")).softmax(dim=-1)
    return (weights.to(values.dtype) @ values).reshape(b, h, x, -1)

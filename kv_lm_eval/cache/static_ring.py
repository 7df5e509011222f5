"""A cache of fixed shapes for decoding one token after another in one compiled graph.

Everything that changes from step to step is in tensors that stay where they are: the number of tokens seen, the slots'
positions, and so the slot that the next pair goes to, the mask and the angle of the sinks. No Python number depends on
the step, so that `torch.compile(fullgraph=True)` traces the step once and CUDA graphs can replay it.

Two kinds of layers, by where a new pair goes:
 - ring: over the oldest pair, slot S + (p - S) mod (W + 1) for position p (`method=streaming_ring`);
 - room: behind the last pair, into slots set aside for the tokens to come (methods that cut after the prefill only, and
   the full cache). The number of slots is rounded up, so that prompts of about one length share a graph.

Shapes: B batch rows, H query heads, K KV heads, G = H / K, N slots, S sinks, W window, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kv_lm_eval.cache.attention import Step, packed_queries
from kv_lm_eval.cache.face import Face
from kv_lm_eval.cache.ring import RingStore
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.cache.view import AskedOfCompression
from kv_lm_eval.errors import UserError

ROUND = 256  # slots


class StaticCache(Face):
    """The pairs of a prefilled segment in tensors that do not move; single tokens for all rows from there on.

    Attributes:
        seen: [B, 1] int64, tokens fed to each row. next_slot: by layer, int64, where the next pair goes (no ring).
        keys, values: by layer [B, K, N, D]. pos: by layer [B, 1 or K, N] int64, -1 where empty. bias: by layer
            [B, K, N] float32 or None. pristine: by layer [B, K, S, D] sink keys as the model made them, or None.
    """

    def __init__(self, cache: Segment, room: int) -> None:
        super().__init__(cache.facts)
        check(cache.compression)
        self.sinks = cache.compression.method.sinks_and_recent or 0
        self.capacity = int(cache.compression.keep([2**31], [2**31], 0, [0])[0]) if cache.compression.method.ring else 0
        if self.capacity:
            _check_rows(cache, self.sinks)
        self.turns = bool(cache.compression.method.in_cache_sinks) and self.capacity > 0
        device = cache.stores[0].keys.device
        self.seen = torch.tensor(cache.seen, device=device)[:, None]
        self.next_slot = torch.tensor([store.length for store in cache.stores], device=device)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.pos: list[torch.Tensor] = []
        self.bias: list[torch.Tensor | None] = []
        self.pristine: list[torch.Tensor | None] = []
        for store in cache.stores:
            if self.capacity:
                if not isinstance(store, RingStore):
                    store = RingStore.of(store, self.sinks, self.capacity + 1 - self.sinks)
                keys, values, pos, bias = store.keys, store.values, store.pos, None
            else:
                more = room + -(store.length + room) % ROUND
                keys, values = (F.pad(x, (0, 0, 0, more)) for x in (store.keys, store.values))
                pos = F.pad(store.pos, (0, more), value=-1)
                bias = None if store.bias is None else F.pad(store.bias, (0, more))
            self.keys.append(keys.clone(memory_format=torch.contiguous_format))
            self.values.append(values.clone(memory_format=torch.contiguous_format))
            self.pos.append(pos.to(torch.long, memory_format=torch.contiguous_format, copy=True))
            self.bias.append(None if bias is None else bias.clone(memory_format=torch.contiguous_format))
            self.pristine.append(store.pristine_sinks.clone() if self.turns else None)  # type: ignore[union-attr]
        for tensor in self._tensors():
            torch._dynamo.mark_static_address(tensor)

    def _tensors(self) -> list[torch.Tensor]:
        lists = (self.keys, self.values, self.pos, self.bias, self.pristine)
        return [self.seen, self.next_slot, *(t for tensors in lists for t in tensors if t is not None)]

    def load(self, other: StaticCache) -> bool:
        """Takes over another cache's contents in place, so that a recorded graph can go on; False: shapes differ."""
        ours, theirs = self._tensors(), other._tensors()
        kinds = [(c.sinks, c.capacity, c.turns, [b is None for b in c.bias]) for c in (self, other)]
        same = kinds[0] == kinds[1] and [t.shape for t in ours] == [t.shape for t in theirs]
        if same:
            for into, new in zip(ours, theirs, strict=True):
                into.copy_(new)
        return same

    # ------------------------------------------------------------------------------------ transformers' protocol

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given with every forward

    # ------------------------------------------------------------------------------------ one layer of one step

    def attend(self, step: Step, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, 1, H, D]; the new pair takes its slot."""
        if step.softcap is not None:
            raise UserError("compile=True: this model caps its attention logits, which the compiled step does not do")
        layer, p = step.layer, self.seen
        keys, values, pos = self.keys[layer], self.values[layer], self.pos[layer]
        per_query_head = keys.shape[1] // step.key.shape[1]
        new_key, new_value = (x.repeat_interleave(per_query_head, dim=1) for x in (step.key, step.value))
        if self.capacity:
            ring = self.capacity + 1 - self.sinks
            slot = self.sinks + (p - self.sinks) % ring  # [B, 1]; rows have their sinks already
        else:
            slot = self.next_slot[layer].expand(p.shape[0], 1)
        rows = torch.arange(p.shape[0], device=p.device)[:, None]
        heads, heads_of_pos = (torch.arange(x.shape[1], device=p.device)[None] for x in (keys, pos))
        # index_put_ is what the compiler does in place: for scatter_ it copies the whole cache at every step
        keys.index_put_((rows, heads, slot), new_key[:, :, 0])
        values.index_put_((rows, heads, slot), new_value[:, :, 0])
        pos.index_put_((rows, heads_of_pos, slot), p)
        if self.turns and self.facts.rotates(layer):
            pristine, rope = self.pristine[layer], self.facts.rope
            assert pristine is not None and rope is not None
            evicted = (p - self.capacity).clamp_min(0)
            keys[:, :, : self.sinks] = rope.rotate(pristine, evicted, layer)
        kv_heads, group = keys.shape[1], step.query.shape[1] // keys.shape[1]
        visible = pos >= 0
        if step.window is not None:
            visible = visible & (p[:, None] - pos < step.window)
        allowed = visible[:, :, None].expand(-1, -1, group, -1)
        bias = self.bias[layer]
        if bias is not None:
            allowed = torch.where(allowed, bias[:, :, None], float("-inf")).to(step.query.dtype)
        out = F.scaled_dot_product_attention(
            packed_queries(step.query, kv_heads), keys, values, attn_mask=allowed, scale=step.scaling
        )
        return out.reshape(step.query.shape[0], 1, step.query.shape[1], -1)

    def lend(self, cache: Segment) -> None:
        """Lets the prefilled segment refer to these tensors instead of its own, which are freed; it counts on."""
        for layer, store in enumerate(cache.stores):
            store._keys, store._values, store._pos = self.keys[layer], self.values[layer], self.pos[layer]
            store._bias, store.pristine_sinks = self.bias[layer], self.pristine[layer]

    def count(self, cache: Segment) -> None:
        """Brings the numbers of the prefilled segment up to one step more, all on the host."""
        cache.seen = [n + 1 for n in cache.seen]
        cache.mode, cache.decoded = "decode", cache.decoded + 1
        for layer, held in enumerate(cache.held):
            cache.held[layer] = grown = [h + 1 for h in held]
            if cache.facts.compressible(layer):
                cache.peaks = [max(p, h) for p, h in zip(cache.peaks, grown, strict=True)]
            if self.capacity:
                cache.held[layer] = [min(h, self.capacity) for h in grown]
        cache.note()

    def advance(self) -> None:
        """After a forward: every row has one token more."""
        self.seen.add_(1)
        self.next_slot.add_(1)


def check(compression: AskedOfCompression) -> None:
    """Raises UserError where the decode step of this method cannot have fixed shapes."""
    method, why = compression.method, None
    if not method.uses_cache:
        why = f"method={method.name} has none"
    elif compression.storage.quantises:
        why = f"{compression.storage.words}: pairs change their form as they age"
    elif method.pages:
        why = f"method={method.name} reads other pages at every token"
    elif method.hides:
        why = f"method={method.name} hides pairs by position instead of dropping them"
    elif compression.schedule.online and method.compresses and not method.ring:
        why = (
            f"compress_every={compression.schedule.compress_every}: cuts go on while tokens are added; "
            "compress_every=0 cuts after the prefill only, and method=streaming_ring overwrites instead of cutting"
        )
    if why:
        raise UserError(f"compile=True needs a cache whose shapes do not change: {why}")


def _check_rows(cache: Segment, sinks: int) -> None:
    """Raises UserError where a ring cannot take the place of this cache's layers."""
    if any(not cache.facts.compressible(i) for i in range(len(cache.stores))):
        raise UserError("compile=True: some layers of this model have windows of their own, which a ring does not keep")
    if min(cache.seen) < sinks:
        raise UserError(
            f"compile=True: a prompt of {min(cache.seen)} tokens is shorter than n_sink={sinks}; lower n_sink"
        )

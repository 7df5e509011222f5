"""Greedy decoding as one compiled step: forward, next token and cache update in a single graph without breaks.

The step is traced once for a batch size and a number of slots and used for every token and every prompt of that shape.
On CUDA it is recorded as a CUDA graph (mode reduce-overhead), so that the host no longer launches kernels one by one; on
a CPU the compiler fuses the small operations. Nothing is read back between steps: the host looks at the new tokens every
`look_every` steps, so that a row may have that many tokens after its end, and goes on until all rows have ended: the
caller cuts answers off where they end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.check import device_of
from kv_lm_eval.cache.static_ring import StaticCache

Ended = Callable[[list[list[int]]], list[bool]]  # new tokens of each row so far -> whether it has ended


MAX_GRAPHS = 64  # one for each batch size and number of slots


class Decoder:
    """The compiled step of one model; keeps the tensors of the last cache, which the next of the same shape reuses.

    Args:
        backend: of torch.compile; "eager" traces the graph and runs it as it is, for tests. None: not compiled at all.
    """

    def __init__(self, model: PreTrainedModel, backend: str | None = "inductor") -> None:
        self._static: StaticCache | None = None

        def step(cache: StaticCache, ids: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=ids, position_ids=cache.seen.clone(), past_key_values=cache, use_cache=True).logits
            cache.advance()
            return logits[:, -1]

        self.step = step
        if backend is not None:
            graphs = backend == "inductor" and device_of(model).type == "cuda"
            more = {"mode": "reduce-overhead"} if graphs else {}
            self.step = torch.compile(step, backend=backend, fullgraph=True, dynamic=False, **more)

    def start(self, cache: CompressedCache, room: int) -> StaticCache:
        """A prefilled cache in fixed shapes, with room for so many tokens more."""
        new = StaticCache(cache, room)
        if self._static is None or not self._static.load(new):
            self._static = new
        return self._static

    @torch.inference_mode()
    def greedy(
        self,
        cache: CompressedCache,
        first_logits: torch.Tensor,
        new_tokens: int,
        ended: Ended | None = None,
        look_every: int = 16,
    ) -> torch.Tensor:
        """Up to `new_tokens` tokens a row [B, n], from a cache of the prompts and the logits [B, V] after them.

        Args:
            ended: asked every `look_every` tokens about all rows; decoding stops when all have ended. None: never.
        """
        static = self.start(cache, new_tokens)
        tokens = [first_logits.argmax(-1, keepdim=True)]
        with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            while len(tokens) < new_tokens:
                tokens.append(self.step(static, tokens[-1]).argmax(-1, keepdim=True))
                if ended is not None and len(tokens) % look_every == 0 and all(ended(torch.cat(tokens, 1).tolist())):
                    break
        return torch.cat(tokens, dim=1)

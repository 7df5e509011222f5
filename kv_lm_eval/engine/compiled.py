"""Greedy decoding as one compiled step: forward, next token and cache update in a single graph without breaks.

The step is traced once for a batch size and a number of slots and used for every token and every prompt of that shape.
On CUDA it is recorded as a CUDA graph (mode reduce-overhead), so that the host no longer launches kernels one by one;
on a CPU the compiler fuses the small operations. Nothing is read back between steps: the host looks at the new tokens
every `look_every` steps, so that a row may have that many tokens after its end, and goes on until all rows have ended:
the caller cuts answers off where they end.

`decoding` puts the same step under transformers' generate(), with its sampling and stops, which reads every token back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.static_ring import StaticCache
from kv_lm_eval.engine.forward import cache_argument, device_of, forward_of, output
from kv_lm_eval.engine.lent import replaced, under_autocast

Ended = Callable[[list[list[int]]], list[bool]]  # new tokens of each row so far -> whether it has ended


MAX_GRAPHS = 64  # one for each batch size and number of slots


class Decoder:
    """The compiled step of one model; keeps the tensors of the last cache, which the next of the same shape reuses.

    Args:
        backend: of torch.compile; "eager" traces the graph and runs it as it is, for tests. None: not compiled at all.
        autocast: the format in which the model is run, None: its own.
    """

    def __init__(
        self, model: PreTrainedModel, backend: str | None = "inductor", autocast: torch.dtype | None = None
    ) -> None:
        self.model = model
        self._static: StaticCache | None = None

        # as it is now: `decoding` puts another in its place
        forward = under_autocast(model.forward, autocast, device_of(model).type)
        name = cache_argument(forward_of(model))

        def step(cache: StaticCache, ids: torch.Tensor) -> torch.Tensor:
            positions = cache.seen.clone()
            logits = forward(input_ids=ids, position_ids=positions, use_cache=True, **{name: cache}).logits
            cache.advance()
            return logits[:, -1]

        self.step = step
        if backend is not None:
            graphs = backend == "inductor" and device_of(model).type == "cuda"
            mode = "reduce-overhead" if graphs else None
            self.step = torch.compile(step, backend=backend, fullgraph=True, dynamic=False, mode=mode)

    def start(self, cache: CompressedCache, room: int) -> StaticCache:
        """A prefilled cache in fixed shapes, with room for so many tokens more; its rows are joined in one segment."""
        new = StaticCache(cache.join(), room)
        if self._static is None or not self._static.load(new):
            self._static = new
        return self._static

    @contextmanager
    def decoding(self, cache: CompressedCache, room: int) -> Iterator[None]:
        """Inside, every forward of a generate() over the cache after the prefill is the compiled step.

        Args:
            cache: empty, or prefilled. It counts as it would without the step; its pairs are no longer its own.
            room: tokens to be generated at most.
        """
        original = self.model.forward
        statics: list[StaticCache] = []

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if cache.prefill_end is None:
                statics.clear()  # those of a prompt before it, where generate() starts anew
                return original(*args, **kwargs)
            if not statics:
                statics.append(self.start(cache, room))
                statics[0].lend(cache.segments[0])
            logits = self.step(statics[0], kwargs["input_ids"])
            statics[0].count(cache.segments[0])
            cache.advance()
            return output(logits[:, None], cache)

        with replaced(self.model, "forward", forward), torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            yield

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

"""What a run will hold in memory, worked out before it: the model's own code and ours, run on tensors without numbers.

A model made from its configuration on the device `meta` has shapes and no weights. A prompt fed to it under a
compressed cache makes and frees the tensors that it would make on a real device, and `LiveBytes` counts them: nothing
is known of any architecture or any method. Only what looks at numbers is answered for it here (`Blind`, `BlindStore`).

What a kernel takes and gives back inside one operation, the device's own context (some hundred MB on CUDA) and what an
allocator keeps are not in it.

Shapes: B rows, H query heads, K KV heads, q new tokens, N slots, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kv_lm_eval.bench.live_bytes import LiveBytes
from kv_lm_eval.cache import hook
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.coded import encode
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.cache.quantized import QuantizedStore
from kv_lm_eval.cache.rope import RopeKit
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.cache.store import Kept, LayerStore
from kv_lm_eval.cache.view import View
from kv_lm_eval.engine import outputs
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.engine.prefill import feed
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.budget import Heads
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.methods.evicted import Drop
from kv_lm_eval.methods.storage import Storage

META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class Bytes:
    """What one batch holds, in bytes.

    Attributes:
        weights: parameters and buffers. prefill: most while the prompts are read, without the weights.
        cache: after the cut at their end, positions and what scores need included.
        answer: most while the answers are written, without the weights.
    """

    weights: int
    prefill: int
    cache: int
    answer: int

    @property
    def most(self) -> int:
        return self.weights + max(self.prefill, self.answer)


class Blind(TorchFunctionMode):
    """Answers for tensors without numbers: attention by its shape alone, lists with zeros, yes or no with `says`."""

    def __init__(self, says: bool = False) -> None:
        super().__init__()
        self.says = says

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            if func in (torch.Tensor.__bool__, torch.equal):
                return self.says
            if func is torch.Tensor.tolist:
                return torch.zeros(args[0].shape, dtype=args[0].dtype).tolist()
        return func(*args, **(kwargs or {}))


class BlindStore(QuantizedStore):
    """Pairs in fewer bits where none is known to be empty: how many are coded follows from shapes alone."""

    def replace(self, kept: Kept, room: int) -> None:
        """As in `QuantizedStore`, [B, K, M] slots, all of them real; those that were coded stay so."""
        b, k, m, _ = kept.keys.shape
        LayerStore.replace(self, dataclasses.replace(kept, keys=kept.keys[..., :0], values=kept.values[..., :0]), room)
        coded = min(self.coded[0][0], m)
        self.coded, self.exact = [[coded] * k] * b, [[m - coded] * k] * b
        self._keep_exact(kept.keys, kept.values, kept.keys.new_full((b, k, 1), coded, dtype=torch.long))


class BlindSegment(Segment):
    """A segment whose stores hold pairs in fewer bits, blindly."""

    def _new_store(self, layer: int) -> BlindStore:
        return BlindStore(self.compression.storage, self.compression.method.in_cache_sinks)


class BlindCompression(Compression):
    """A compression whose cuts go by shapes where the method or the treatment looks at numbers: what these themselves
    take is then not counted."""

    def score(self, view: View) -> torch.Tensor:
        """[B, K, N]"""
        try:
            return super().score(view)
        except NotImplementedError:
            return torch.zeros_like(view.keys[..., 0])

    @staticmethod
    def of(compression: Compression, **changes: Any) -> BlindCompression:
        parts = {f.name: getattr(compression, f.name) for f in dataclasses.fields(compression)}
        return BlindCompression(**{**parts, **changes})


class Estimate:
    """A model without weights, and what batches on it would hold.

    Args:
        config: of the model. dtype: of weights, keys and values.

    Raises:
        UserError: transformers has no causal language model of this configuration, or its attention is its own.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        hook.register()
        try:
            with META:
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        except (ValueError, KeyError) as error:
            raise UserError(f"no causal language model can be made of this config.json: {error}") from error
        if not self.model._can_set_attn_implementation():
            raise UserError(
                f"{type(self.model).__name__} does not let its attention function be chosen, so that its cache cannot "
                "be compressed: there is nothing to plan"
            )
        self.model.set_attn_implementation(hook.NAME)
        embeddings: Any = self.model.get_input_embeddings()
        embeddings._hf_hook = SimpleNamespace(execution_device=META)  # ids go where weights are to be, as in offloading
        text = config.get_text_config()
        self.facts = ModelFacts(text.num_hidden_layers, getattr(text, "max_position_embeddings", None))
        self._feed(make_cache(FULL, self.facts), 1, 2)  # layers are known when they have been met
        self.facts.rope = RopeKit(self.model, self.facts.modules)
        self.facts.rope_kinds = ["rope"] * self.facts.num_layers
        with torch.inference_mode(), Blind(says=True):
            outputs.find(self.model, self.facts, FULL)

    @property
    def weights(self) -> int:
        held = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(t.numel() * t.element_size() for t in held.values())

    @torch.inference_mode()
    def _feed(self, cache: CompressedCache, rows: int, tokens: int) -> None:
        with Blind():
            feed(self.model, cache, [[0] * tokens] * rows, keep=1)

    def of(self, compression: Compression, rows: int, prompt: int, new: int, chunk: int | None = None) -> Bytes:
        """A batch of so many rows, each with a prompt of `prompt` tokens and an answer of `new` more.

        Args:
            chunk: tokens of a prompt in one forward; None: all.
        """
        even = BlindCompression.of(compression, heads=Heads())  # how heads share a budget is up to the numbers
        try:
            prefill, held, step = self._run(even, rows, prompt, chunk)
        except NotImplementedError:
            prefill, held, step = self._run(BlindCompression.of(even, evicted=Drop()), rows, prompt, chunk)
        return Bytes(self.weights, prefill, held, step + rows * self._growth(compression, prompt, new))

    def _run(self, compression: Compression, rows: int, prompt: int, chunk: int | None) -> tuple[int, int, int]:
        """Most bytes while the prompts are read, those after it, and most during one step."""
        cache = make_cache(compression, self.facts, chunk)
        if compression.storage.quantises:
            cache = CompressedCache(compression, self.facts, BlindSegment)
            cache.prefill_chunk = chunk
        with LiveBytes([*self.model.parameters(), *self.model.buffers()]) as live:
            if chunk is not None and prompt > chunk:  # the last chunk, beside what all before it have left, takes most
                cache.prefill_chunk = None
                cache.set(mode="hold")
                self._feed(cache, rows, prompt - chunk)
                cache.set(mode="prefill", decoded=0)
                live.peak = live.now
            self._feed(cache, rows, prompt if chunk is None else min(prompt, chunk))
            prefill, held = live.peak, live.now
            live.peak = held
            with suppress(NotImplementedError):  # what a step reads is up to the numbers: as much as was held
                self._feed(cache, rows, 1)
        return prefill, held, live.peak

    def largest(self, memory: int, of: Callable[[int], Bytes]) -> int:
        """The most rows whose batch stays within so many bytes; of: the bytes of a batch of so many rows."""
        one, two = of(1).most, of(2).most
        if one > memory:
            return 0
        rows = 1 + (memory - one) // max(1, two - one)  # nearly straight: some blocks have a size of their own
        while rows > 1 and of(rows).most > memory:
            rows -= max(1, rows // 64)
        while of(rows + 1).most <= memory:
            rows += 1
        return rows

    def _slots(self, compression: Compression, layer: int, prompt: int, new: int) -> tuple[int, int]:
        """Slots per KV head of a layer after the cut that follows the prompt, and at the end of the answer."""
        window = self.facts.sliding_windows[layer]
        if layer not in self.facts.cut_layers:
            return tuple(n if window is None else min(n, window - 1) for n in (prompt, prompt + new))  # type: ignore
        *_, last = trace = list(compression.trace(prompt, new, layer, self.facts.cut_layers))
        return int(trace[0][1]), int(last[1])

    def _growth(self, compression: Compression, prompt: int, new: int) -> int:
        """Bytes by which the cache of a row grows while its answer is written."""
        grown = 0
        for layer in range(self.facts.num_layers):
            first, last = self._slots(compression, layer, prompt, new)
            grown += max(0, last - first) * self._pair_bytes(compression.storage, layer)
        return grown

    def _pair_bytes(self, storage: Storage, layer: int) -> int:
        """Bytes of keys and values of one slot of all heads of a layer."""
        module: Any = self.facts.modules[layer]
        text, heads = self.model.config.get_text_config(), self.facts.heads[layer][1]
        size = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
        size = size or text.hidden_size // text.num_attention_heads
        if not storage.quantises:
            return int(2 * heads * size * self.model.dtype.itemsize)
        x = torch.empty(1, heads, storage.step, size, dtype=self.model.dtype, device=META)
        real = torch.ones(x.shape[:3], dtype=torch.bool, device=META)
        with Blind():
            return sum(encode(c, x, real).allocated_bytes for c in (storage.keys, storage.values)) // storage.step

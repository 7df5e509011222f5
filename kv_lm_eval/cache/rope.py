"""Rotary embeddings, whatever the model: move a key by a number of positions with the model's own functions.

Why: StreamingLLM numbers the kept tokens by their place in the cache. Keys are held rotated, so a key that is to
appear `delta` positions later is rotated by `delta` more. The functions and tables are the model's own, so that
partial, interleaved, linearly scaled, Llama-3 and YaRN embeddings need no code of ours; `check.py` proves on each
model that rotating by delta is the same as having been at position + delta.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn


class RopeKit:
    """Rotates keys of a model's layers by position differences.

    Args:
        model: the causal LM.
        attention_modules: the attention module of each layer, by layer index.
    """

    def __init__(self, model: nn.Module, attention_modules: dict[int, nn.Module]) -> None:
        self._modules = attention_modules
        self._rotary = next(
            (m for m in model.modules() if "RotaryEmbedding" in type(m).__name__ and _has_frequencies(m)), None
        )

        self._last: tuple[object, ...] = (None,)  # of the tables made last: their positions, and whose they are
        self._last_tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self._by_layer_type = (
            self._rotary is not None and "layer_type" in inspect.signature(self._rotary.forward).parameters
        )

    def available(self, layer: int) -> bool:
        """Whether the layer's file has a rotary function and the model a rotary table."""
        return self._rotary is not None and self._apply(layer) is not None

    def _apply(self, layer: int):  # type: ignore[no-untyped-def]
        module = sys.modules[type(self._modules[layer]).__module__]
        return getattr(module, "apply_rotary_pos_emb", None)

    def forget(self, device: torch.device) -> None:
        """Lets frequencies that grew with the last sequence, which the module keeps, be those of a short one again."""
        self.angles(device, [0])

    def angles(self, device: torch.device, positions: list[int]) -> list[torch.Tensor]:
        """Cosines and sines [1, n, D] of each kind of layer for one sequence with tokens at these n positions."""
        like, at = torch.empty(0, device=device), torch.tensor([positions], device=device)
        layers = list(self._modules) if self._by_layer_type else list(self._modules)[:1]
        return [table for layer in layers for table in self._tables(like, at, layer)[:2]]

    def _layer_type(self, layer: int) -> str | None:
        """By what the model calls its table for this layer: the configuration says it, not every module does."""
        config = getattr(self._modules[layer], "config", None)
        types = getattr(config, "layer_types", None)
        return types[layer] if types else getattr(self._modules[layer], "layer_type", None)

    def rotate(self, keys: torch.Tensor, delta: torch.Tensor, layer: int, over: int = 1) -> torch.Tensor:
        """Keys [B, K, N, D] at position p -> the same keys at p + delta; delta [B, N] or [B, 1], in tokens.

        Exact up to rounding: fp32 2e-5, half precision one rounding, since keys are never rotated twice.

        Args:
            delta: may be [B, K, N] too, a difference for each head; need not be whole.
            over: mean of the keys at p + delta, ..., p + delta + over - 1: rotations are linear in their tables.
        """
        if delta.dim() == 3:
            b, k, n, d = keys.shape
            each = delta.expand(b, k, n).reshape(b * k, n)
            return self.rotate(keys.reshape(b * k, 1, n, d), each, layer, over).view(b, k, n, d)
        traced = torch.compiler.is_compiling()  # a graph must not depend on what was kept from step to step
        cos, sin = (self._made if traced else self._kept)(keys, delta, layer, over)
        work = keys.to(torch.promote_types(keys.dtype, cos.dtype))
        rotated_dim = cos.shape[-1]
        head, tail = work[..., :rotated_dim], work[..., rotated_dim:]
        apply = self._apply(layer)
        alone = (_turns_one if traced else _known_to_turn_one)(apply)
        # of two, the second is there for its form only
        turned = apply(head, cos, sin) if alone else apply(head, head[:, :1], cos, sin)[0]
        return (torch.cat([turned, tail], dim=-1) if tail.shape[-1] else turned).to(keys.dtype)

    def _kept(
        self, keys: torch.Tensor, delta: torch.Tensor, layer: int, over: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B, N, R] of `rotate`; those of the very tensor that came last, which layers of a step
        share and nobody writes to, are there."""
        whose = (self._layer_type(layer) if self._by_layer_type else None, keys.shape, keys.dtype, over)
        if delta is not self._last[0] or self._last[1:] != whose or self._last_tables is None:
            self._last, self._last_tables = (delta, *whose), self._made(keys, delta, layer, over)
        return self._last_tables

    def _made(
        self, keys: torch.Tensor, delta: torch.Tensor, layer: int, over: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, made anew."""
        if over == 1:
            cos, sin, scaling = self._tables(keys, delta.expand(keys.shape[0], keys.shape[2]), layer)
        else:
            positions = (delta.unsqueeze(2) + torch.arange(over, device=delta.device)).flatten(1)
            cos, sin, scaling = self._tables(keys, positions, layer)
            cos, sin = (x.unflatten(1, (-1, over)).mean(2) for x in (cos, sin))
        return (cos, sin) if scaling == 1.0 else (cos / scaling, sin / scaling)

    def _tables(
        self, keys: torch.Tensor, positions: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        rotary = self._rotary
        assert rotary is not None
        # float32 tables even for half-precision keys
        like = torch.empty(1, dtype=torch.promote_types(keys.dtype, torch.float32), device=keys.device)
        if self._by_layer_type:
            layer_type = self._layer_type(layer)
            cos, sin = rotary(like, positions, layer_type)
            scaling = getattr(rotary, f"{layer_type}_attention_scaling", 1.0)
        else:
            cos, sin = rotary(like, positions)
            scaling = getattr(rotary, "attention_scaling", 1.0)
        return cos, sin, float(scaling or 1.0)


def _turns_one(apply: Callable[..., Any]) -> bool:
    """Whether a model's rotary function turns one tensor; most turn two."""
    return list(inspect.signature(apply).parameters).index("cos") == 1


_known_to_turn_one = lru_cache(_turns_one)


def _has_frequencies(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))

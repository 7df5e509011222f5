"""Which module of a layer is its output projection: the one that is given what our attention function returned.

Found by watching a forward, so that no names of modules are listed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kv_lm_eval.cache.attention import Step
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.engine.forward import device_of, logits_of
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.compression import Compression

TOKENS = 8


class _Noting(CompressedCache):
    """Notes what attention gives to each layer, [B, q, H * D]."""

    given: dict[int, torch.Tensor]

    def attend(self, step: Step, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, q, H, D], as ever."""
        out = super().attend(step, mask)
        self.given[step.layer] = out.flatten(2)
        return out


@torch.inference_mode()
def find(model: PreTrainedModel, facts: ModelFacts, full: Compression) -> None:
    """Fills `facts.outputs` with the modules that multiply what attention gave by a matrix, and add a bias at most.

    Args:
        full: a compression that evicts nothing; the model is under our attention.
    """
    cache = _Noting(full, facts)
    cache.given = {}
    met: dict[int, tuple[nn.Module, torch.Tensor]] = {}

    def note(layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        given = cache.given.get(layer)
        if layer not in met and given is not None and args and isinstance(args[0], torch.Tensor):
            if args[0].shape == given.shape and torch.equal(args[0], given):
                met[layer] = module, given

    handles = [
        part.register_forward_pre_hook(partial(note, layer))
        for layer, attention in facts.modules.items()
        for part in attention.modules()
        if part is not attention
    ]
    ids = torch.arange(TOKENS, device=device_of(model)) % model.config.get_text_config().vocab_size
    try:
        logits_of(model, ids[None], positions=torch.arange(TOKENS)[None], cache=cache)
    finally:
        for handle in handles:
            handle.remove()
    facts.outputs = {layer: module for layer, (module, given) in met.items() if _linear(module, given)}


def _linear(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether the module of a sum is the sum, up to rounding and a bias; x: [B, q, H * D]."""
    y, none = x.flip(1), torch.zeros_like(x)
    together, apart = module(x + y) + module(none), module(x) + module(y)
    allowed = 5e-2 if x.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return bool((together - apart).float().norm() <= allowed * apart.float().norm())


def check(facts: ModelFacts, kind: str, method: str) -> None:
    """Raises UserError where values cannot be followed behind the attention, which the method asks for.

    Args:
        kind: the model's class.
    """
    asks, instead = f"method={method} on {kind}: it", "take a method that looks at attention alone, such as snapkv"
    if missing := sorted(set(facts.cut_layers) - set(facts.outputs)):
        raise UserError(
            f"{asks} multiplies values by the layer's output projection, and attention in layer {missing[0]} "
            f"({type(facts.modules[missing[0]]).__name__}) hands its output to nothing that is one matrix (a gate or a "
            f"norm may come before it); {instead}"
        )

from __future__ import annotations

import torch
from torch import Tensor

from kv_lm_eval.methods.base import Method, View, setting


class Random(Method):
    """A random choice: the floor that every scorer must beat.

    The score of a token is a hash of (seed, layer, head, position), so that it is the same in any batch, on any
    device and in any order of requests, and differs between heads and layers.
    """

    slotwise = True
    evicts_in_prefill = True

    seed: int = setting(0, "another seed, another choice")

    def score(self, view: View) -> Tensor:
        """[B, K, N]: a hash of where and in which head each token stands."""
        return position_hash(view, self.seed)


def position_hash(view: View, seed: int) -> Tensor:
    """A number in [0, 2^24) for every slot, [B, K, N]: two rounds of an avalanche hash on 32 bits."""
    heads = torch.arange(view.keys.shape[1], device=view.pos.device).view(1, -1, 1)
    x = view.pos.long() + 0x9E3779B1 * (heads + 1) + 0x85EBCA77 * (view.layer + 1) + 0xC2B2AE3D * (seed + 1)
    for factor in (0x7FEB352D, 0x846CA68B):
        x = x & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 15)) & 0xFFFFFF).float()

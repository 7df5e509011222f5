from __future__ import annotations

from math import floor

import torch
from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting
from kv_lm_eval.methods.random_ import position_hash


class L2Fixed(Method):
    """A cache of fixed size: the newest tokens are protected, and of the older ones the key norm (or chance) decides.

    Paper: arXiv:2406.11430 for the norm. Reference: cny123222/LLM-Efficient-Reasoning, kvcompress (fix_size_l2).
    Deviations: ties go to the older token; strategy=random hashes the position instead of drawing, so that a run can be
    repeated; no layer is left whole unless skip_layers says so (the reference leaves layers 0 and 1 whole, and then
    reports their length as the size).
    """

    paper = "arXiv:2406.11430"
    presets = {"compress_every": 1}
    capacity_settings = ("cache_size",)
    slotwise = True
    evicts_in_prefill = True

    cache_size: int = setting(512, "slots per KV head, protected ones included")
    strategy: str = setting("keep_low", "which older tokens stay", ("keep_low", "keep_high", "random", "recent_only"))
    recent_ratio: float = setting(0.5, "share of cache_size that is protected as most recent")
    seed: int = setting(0, "of strategy=random")

    def validate(self) -> None:
        if self.cache_size < 2:
            raise UserError(f"cache_size={self.cache_size} must be at least 2: one protected and one chosen slot")
        if not 0 <= self.recent_ratio < 1:
            raise UserError(f"recent_ratio={self.recent_ratio} is outside [0, 1): some slots must be left to choose")

    @property
    def own_capacity(self) -> int | None:
        return self.cache_size

    @property
    def protected(self) -> int:
        return floor(self.cache_size * self.recent_ratio)

    def score(self, view: View) -> Tensor:
        if self.strategy == "recent_only":
            return view.pos.float()
        if self.strategy == "random":
            scores = position_hash(view, self.seed)
        else:
            norms = (view.keys.float().norm(dim=-1).log2() * 2**14).round()  # repeated tokens tie, see knorm
            scores = norms if self.strategy == "keep_high" else -norms
        return torch.where(view.recent(self.protected), float("inf"), scores)

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting
from kv_lm_eval.methods.knorm import key_norms
from kv_lm_eval.methods.random_ import position_hash

if TYPE_CHECKING:
    from kv_lm_eval.cache.facts import ModelFacts

SIZE = 512


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

    cache_size: int | None = setting(None, f"slots per KV head, protected ones included; {SIZE} without another budget")
    strategy: str = setting("keep_low", "which older tokens stay", ("keep_low", "keep_high", "random", "recent_only"))
    recent_ratio: float = setting(0.5, "share of the kept slots that is protected as most recent")
    seed: int = setting(0, "of strategy=random")

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {"cache_size": slots, "compress_every": 16}

    def validate(self) -> None:
        if self.cache_size is not None and self.cache_size < 2:
            raise UserError(f"cache_size={self.cache_size} must be at least 2: one protected and one chosen slot")
        if not 0 <= self.recent_ratio < 1:
            raise UserError(f"recent_ratio={self.recent_ratio} is outside [0, 1): some slots must be left to choose")

        if self.seed and self.strategy != "random":
            raise UserError(f"seed={self.seed} has no effect with strategy={self.strategy}: only strategy=random draws")

    def warnings(self, facts: ModelFacts) -> list[str]:
        if self.strategy == "recent_only" and self.recent_ratio != 0.5:
            return [f"recent_ratio={self.recent_ratio:g} has no effect with strategy=recent_only: all are recent"]
        return []

    @property
    def own_capacity(self) -> int | None:
        return SIZE if self.cache_size is None else self.cache_size

    @property
    def heads_alike(self) -> bool:
        return self.strategy == "recent_only"

    @property
    def reads_budget(self) -> bool:
        return True

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the newest always, then by norm or chance; [B, 1 or K, N] where only position counts."""
        if self.strategy == "recent_only":
            return view.pos.float()
        if self.strategy == "random":
            scores = position_hash(view, self.seed)
        else:
            norms = key_norms(view)
            scores = norms if self.strategy == "keep_high" else -norms
        protected = [floor(Fraction(repr(self.recent_ratio)) * keep) for keep in view.keep]
        return scores.masked_fill(view.recent(protected), float("inf"))

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting

if TYPE_CHECKING:
    from kv_lm_eval.cache.facts import ModelFacts


class StreamingLLM(Method):
    """Attention sinks and a recent window: the first n_sink and the last window_size tokens stay.

    With positions=in_cache the kept tokens are numbered by their place in the cache, as in the paper. Nothing is
    re-rotated but the sinks, each time from a pristine copy: keys of the window keep their true positions and the
    sinks are moved up by the number of evicted tokens, which gives the same distances without accumulated rounding.

    compress_every=R > 1 is lazy pruning: a cut follows as soon as R slots more than sinks + window are held, and the
    query of that step has seen all of them. cache_slack and max_drop (see `Schedule.after_cut`) make such cuts partial.
    total_budget names the most slots that are ever held and derives the window from it, lazy growth included:
    window = total_budget - n_sink - overlap - refresh_budget - max(cache_slack, compress_every). refresh_budget is a
    negative control, known to be harmful: see cache/refresh.py.

    Paper: arXiv:2309.17453, section 3.2. Reference: mit-han-lab/streaming-llm, streaming_llm/kv_cache.py (mode=mit);
    hopecommon/CS3602@b3ebb26 (lazy pruning, slack and max_drop, overlap).
    Deviations: the prompt's own forward is full attention and the cut comes after it; mode=mit is that reference at
    compress_every=1, which keeps keys before their rotation: the same logits, to rounding. CS3602's total leaves out
    the lazy growth, so that its peaks pass the total; ours does not.
    """

    paper = "arXiv:2309.17453"
    presets = {"compress_every": 1, "trigger": "excess"}
    capacity_settings = ("window_size", "total_budget")
    slotwise = True
    evicts_in_prefill = True

    n_sink: int = setting(4, "first tokens of the sequence that always stay")
    window_size: int | None = setting(None, "most recent tokens kept; or name the total by max_capacity_prompt")
    overlap: int = setting(0, "more recent tokens kept, added to window_size")
    total_budget: int | None = setting(None, "most slots ever held, lazy growth included; instead of window_size")
    positions: str = setting("in_cache", "numbering of the kept tokens", ("in_cache", "absolute"))
    refresh_budget: int = setting(0, "negative control: dropped tokens put back at the cache's end by each cut")
    refresh_policy: str = setting("none", "which of the dropped: evenly spaced", ("none", "uniform"))
    mode: str = setting("ours", "mit: the published cache, nothing but sinks and window", ("ours", "mit"))
    compress_every: int = setting(1, "cut when this many slots more than sinks and window are held")
    cache_slack: int = setting(0, "slots over the budget that a cut with max_drop may leave")
    max_drop: int = setting(0, "slots that a cut drops, as long as no more than cache_slack stay; 0: all")

    def validate(self) -> None:
        if self.n_sink < 0:
            raise UserError(f"n_sink={self.n_sink} is negative; 0 means a plain window (method=window)")
        if self.overlap < 0:
            raise UserError(f"overlap={self.overlap} is negative; it is a number of tokens added to the window")
        if self.window_size is not None and self.window_size < 1:
            raise UserError(f"window_size={self.window_size} keeps no recent token; it must be at least 1")
        if self.window_size is not None and self.total_budget is not None:
            raise UserError(
                f"window_size={self.window_size} and total_budget={self.total_budget} both fix the window; give one"
            )
        if self.overlap and self.window_size is None and self.total_budget is None:
            raise UserError(f"overlap={self.overlap} is added to a window: give window_size or total_budget")
        if self.mode == "mit":
            ours = {
                "compress_every": 1,
                "cache_slack": 0,
                "max_drop": 0,
                "overlap": 0,
                "refresh_budget": 0,
                "positions": "in_cache",
            }
            for name, value in ours.items():
                if getattr(self, name) != value:
                    raise UserError(
                        f"mode=mit is the published cache, with {name}={value}; {name}={getattr(self, name)} is not "
                        "in it (mode=ours has it)"
                    )
        if (self.refresh_budget > 0) != (self.refresh_policy != "none") or self.refresh_budget < 0:
            raise UserError(
                f"refresh_budget={self.refresh_budget} and refresh_policy={self.refresh_policy} say different things: "
                "give refresh_budget=N,refresh_policy=uniform, or neither"
            )
        if self.refresh_budget and (self.positions != "in_cache" or not self.n_sink):
            raise UserError("refresh_budget renumbers the cache: it needs positions=in_cache and n_sink of at least 1")
        if self.refresh_budget and self.window_size is None and self.total_budget is None:
            raise UserError(
                f"refresh_budget={self.refresh_budget} is beside a window: give window_size or total_budget"
            )
        if self.total_budget is not None and self._window < 1:
            raise UserError(
                f"total_budget={self.total_budget} leaves a window of {self._window} after n_sink={self.n_sink}, "
                f"overlap={self.overlap}, refresh_budget={self.refresh_budget} and max(cache_slack, compress_every)="
                f"{self._reserve}; it must be at least {self.total_budget - self._window + 1}"
            )

    @property
    def _reserve(self) -> int:
        return max(self.cache_slack, self.compress_every)

    @property
    def _window(self) -> int:
        if self.total_budget is not None:
            return self.total_budget - self.n_sink - self.overlap - self.refresh_budget - self._reserve
        return self.window_size or 0

    @property
    def protected(self) -> int:
        return self.n_sink

    @property
    def own_capacity(self) -> int | None:
        if self.window_size is None and self.total_budget is None:
            return None
        return self.n_sink + self._window + self.overlap + self.refresh_budget

    @property
    def in_cache_sinks(self) -> int:
        return self.n_sink if self.positions == "in_cache" else 0

    @property
    def sinks_and_recent(self) -> int | None:
        return None if self.refresh_budget else self.n_sink

    @property
    def reinserted(self) -> int:
        return self.refresh_budget

    def warnings(self, facts: ModelFacts) -> list[str]:
        if self.refresh_budget:
            return ["refresh_budget is a negative control: putting evicted tokens back at the end is known to harm"]
        peak = (self.own_capacity or 0) + self.compress_every
        if facts.max_positions and self.positions == "in_cache" and peak > facts.max_positions:
            return [
                f"the cache grows to {peak} slots before each cut, past the {facts.max_positions} positions that the "
                "model was trained on: its numbers get worse by that alone. A window that does not is derived from "
                f"total_budget={facts.max_positions}."
            ]
        return []

    def score(self, view: View) -> Tensor:
        """[B, 1 or K, N]: the sinks always, then the newest, the same for all heads."""
        return view.pos.float().masked_fill(view.first(self.n_sink), float("inf"))

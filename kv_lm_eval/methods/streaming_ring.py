from __future__ import annotations

from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting


class StreamingRing(Method):
    """StreamingLLM in a ring buffer: one pair is overwritten at each token, and only the sinks are rotated again.

    The same cache as method=streaming_llm with compress_every=1, and the same answers, without moving the window: a
    step costs what a step over a cache of fixed size costs, whatever was seen before.

    Paper: arXiv:2309.17453 for the cache. Reference: none; see cache/ring.py.
    Deviations: the prompt's own forward is full attention and the cut comes after it.
    """

    paper = "arXiv:2309.17453"
    presets = {"compress_every": 1}
    capacity_settings = ("window_size",)
    ring = True
    evicts_in_prefill = True

    n_sink: int = setting(4, "first tokens of the sequence that always stay")
    window_size: int | None = setting(None, "most recent tokens kept; or name the total by max_capacity_prompt")
    positions: str = setting("in_cache", "numbering of the kept tokens", ("in_cache", "absolute"))

    def validate(self) -> None:
        if self.n_sink < 0:
            raise UserError(f"n_sink={self.n_sink} is negative; it is a number of tokens, 0 or more")
        if self.window_size is not None and self.window_size < 1:
            raise UserError(f"window_size={self.window_size} keeps no recent token; it must be at least 1")

    @property
    def protected(self) -> int:
        return self.n_sink

    @property
    def own_capacity(self) -> int | None:
        return None if self.window_size is None else self.n_sink + self.window_size

    @property
    def in_cache_sinks(self) -> int:
        return self.n_sink if self.positions == "in_cache" else 0

    @property
    def sinks_and_recent(self) -> int:
        return self.n_sink

    def score(self, view: View) -> Tensor:
        """[B, 1 or K, N]: the sinks always, then the newest, the same for all heads."""
        return view.pos.float().masked_fill(view.first(self.n_sink), float("inf"))

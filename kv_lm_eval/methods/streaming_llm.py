from __future__ import annotations

from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting


class StreamingLLM(Method):
    """Attention sinks and a recent window: the first n_sink and the last window_size tokens stay.

    With positions=in_cache the kept tokens are numbered by their place in the cache, as in the paper. Nothing is
    re-rotated but the sinks, each time from a pristine copy: keys of the window keep their true positions and the
    sinks are moved up by the number of evicted tokens, which gives the same distances without accumulated rounding.

    Paper: arXiv:2309.17453, section 3.2. Reference: mit-han-lab/streaming-llm, streaming_llm/kv_cache.py.
    Deviations: the prompt's own forward is full attention and the cut comes after it (prefill "full");
    compress_every > 1 is lazy pruning, in which up to compress_every more tokens are held between two cuts.
    """

    paper = "arXiv:2309.17453"
    presets = {"compress_every": 1}
    capacity_setting = "window_size"

    n_sink: int = setting(4, "first tokens of the sequence that always stay")
    window_size: int | None = setting(None, "most recent tokens kept; or name the total by max_capacity_prompt")
    positions: str = setting("in_cache", "numbering of the kept tokens", ("in_cache", "absolute"))

    def validate(self) -> None:
        if self.n_sink < 0:
            raise UserError(f"n_sink={self.n_sink} is negative; 0 means a plain window (method=window)")
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

    def score(self, view: View) -> Tensor:
        return view.pos.float().masked_fill(view.first(self.n_sink), float("inf"))

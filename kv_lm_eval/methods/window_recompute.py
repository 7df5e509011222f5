from __future__ import annotations

from typing import Any

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, setting


class WindowRecompute(Method):
    """No cache: every token is predicted by a fresh forward over the last n_sink + window_size tokens.

    The "fixed baseline" that published speed-ups of StreamingLLM are measured against: its quality is that of a
    bounded context, its cost grows with the square of the window at every token. There are no sinks in it: n_sink only
    lengthens the window, so that it sees as many tokens as method=streaming_llm holds. A window with a cache
    (method=window) is something else from two layers on: its keys were computed with evicted tokens in view.

    Paper: arXiv:2309.17453, "sliding window with re-computation". Reference: hopecommon/CS3602, run_fixed_baseline.py.
    Deviations: none.
    """

    paper = "arXiv:2309.17453 (sliding window with re-computation)"
    compresses = False
    uses_cache = False

    n_sink: int = setting(4, "tokens added to the window; no sinks")
    window_size: int = setting(508, "most recent tokens, the newest included")

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {"n_sink": 0, "window_size": slots}

    def validate(self) -> None:
        if self.n_sink < 0 or self.window_size < 1:
            raise UserError(
                f"n_sink={self.n_sink} must be 0 or more and window_size={self.window_size} at least 1: every token is "
                "predicted from the n_sink + window_size tokens before it"
            )

    @property
    def recomputed_tokens(self) -> int:
        return self.n_sink + self.window_size

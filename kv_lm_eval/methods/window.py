from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting


class Window(Method):
    """A sliding window: only the most recent tokens stay, no attention sinks.

    Known to break as soon as the first token leaves the cache (StreamingLLM, table 1): the floor that sinks are
    measured against. Positions stay true; for rotary models only distances matter, so in-cache positions would give
    the same result.

    Paper: arXiv:2309.17453, window attention. Reference: none needed.
    Deviations: the prompt's own forward is full attention, and the cut comes after it (prefill "full").
    """

    paper = "arXiv:2309.17453 (window attention)"
    presets = {"compress_every": 1}
    capacity_settings = ("window_size",)
    slotwise = True
    evicts_in_prefill = True

    window_size: int | None = setting(None, "most recent tokens kept; or name the budget by max_capacity_prompt")

    def validate(self) -> None:
        if self.window_size is not None and self.window_size < 1:
            raise UserError(f"window_size={self.window_size} keeps nothing; it is a number of tokens, at least 1")

    @property
    def own_capacity(self) -> int | None:
        return self.window_size

    @property
    def sinks_and_recent(self) -> int:
        return 0

    def score(self, view: View) -> Tensor:
        """[B, 1 or K, N]: the newest first, the same for all heads."""
        return view.pos.float()

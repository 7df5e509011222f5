from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting


class SnapKV(Method):
    """The last window_size queries vote: tokens (and their neighbours) that they attend to stay, and the window itself.

    Paper: arXiv:2404.14469, section 4. Reference: FasterDecoding/SnapKV, snapkv/monkeypatch/snapkv_utils.py.
    Defaults: those of the LongBench configurations (window 32, kernel 7, max pooling).
    Deviations: one choice per KV head, by the mean over its query heads (the original repeats keys and values and
    chooses per query head, a cache G times as large); votes are summed in float32; ties go to the older token.
    """

    paper = "arXiv:2404.14469"

    window_size: int = setting(32, "observation window: last queries that vote, always kept")
    kernel_size: int = setting(7, "width of the pooling over neighbouring tokens, odd")
    pooling: str = setting("max", "how votes are pooled", ("max", "avg"))

    def validate(self) -> None:
        if self.window_size < 1:
            raise UserError(f"window_size={self.window_size}: SnapKV needs at least one query that votes")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(
                f"kernel_size={self.kernel_size} must be odd and positive: an even kernel has no "
                "centre and would shift "
                f"the votes by half a token; take {self.kernel_size - 1 if self.kernel_size > 1 else 1} or "
                f"{max(1, self.kernel_size + 1)}"
            )

    @property
    def num_queries(self) -> int:
        return self.window_size

    @property
    def protected(self) -> int:
        return self.window_size

    def weights(self, view: View) -> Tensor:
        votes = view.attention(self.window_size).sum(3).mean(2)  # [B, K, N]
        return votes.masked_fill(view.recent(self.window_size), 0.0)

    def score(self, view: View) -> Tensor:
        recent, votes = view.recent(self.window_size), self.weights(view)
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        pooled = pool(votes, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pooled.masked_fill(recent, float("inf"))

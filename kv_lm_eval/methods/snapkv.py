from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting

if TYPE_CHECKING:
    from kv_lm_eval.cache.facts import ModelFacts


class SnapKV(Method):
    """The last window_size queries vote: tokens (and their neighbours) that they attend to stay, and the window itself.

    Paper: arXiv:2404.14469, section 4. Reference: FasterDecoding/SnapKV, snapkv/monkeypatch/snapkv_utils.py.
    Defaults: those of the LongBench configurations (window 32, kernel 7, max pooling).
    Deviations: gqa=kv_head makes one choice per KV head, by the mean over its query heads; gqa=query_head is the
    original, which repeats keys and values and chooses per query head: a cache G times as large, counted as such. Votes
    are summed in float32; ties go to the older token.
    """

    paper = "arXiv:2404.14469"

    window_size: int = setting(32, "observation window: last queries that vote, always kept")
    kernel_size: int = setting(7, "width of the pooling over neighbouring tokens, odd")
    pooling: str = setting("max", "how votes are pooled", ("max", "avg"))
    gqa: str = setting("kv_head", "who chooses; query heads: from a cache repeated for each", ("kv_head", "query_head"))

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {**super().example(slots), "window_size": min(16, slots // 2)}

    def validate(self) -> None:
        if self.window_size < 1:
            raise UserError(f"window_size={self.window_size}: SnapKV needs at least one query that votes")
        check_kernel(self.kernel_size)
        if self.kernel_size == 1 and self.pooling != "max":
            raise UserError(f"pooling={self.pooling} has no effect with kernel_size=1, which pools nothing")

    @property
    def num_queries(self) -> int:
        return self.window_size

    @property
    def protected(self) -> int:
        return self.window_size

    @property
    def per_query_head(self) -> bool:
        return self.gqa == "query_head"

    def warnings(self, facts: ModelFacts) -> list[str]:
        groups = [getattr(module, "num_key_value_groups", 1) for module in facts.modules.values()]
        if self.per_query_head and groups and max(groups) == 1:
            return ["gqa=query_head has no effect: the model has as many KV heads as query heads"]
        return []

    def weights(self, view: View) -> Tensor:
        """[B, K, N]: attention of the window's queries, summed over these, mean over the query heads of a group."""
        return view.votes(self.window_size)

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the window always, then the votes, pooled over neighbours."""
        recent = view.recent(self.window_size)
        votes = self.weights(view).masked_fill(recent, 0.0)
        return pooled(votes, self.kernel_size, self.pooling).masked_fill(recent, float("inf"))


def check_kernel(kernel_size: int) -> None:
    """Raises UserError for a kernel that cannot be centred on a token."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(
            f"kernel_size={kernel_size} must be odd and positive: an even kernel has no centre and would shift the "
            f"votes by half a token; take {kernel_size - 1 if kernel_size > 1 else 1} or {max(1, kernel_size + 1)}"
        )


def pooled(scores: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Scores [B, K, N], each the largest ("max") or the average ("avg", zeros beyond the ends) of its neighbourhood."""
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    kernel = min(kernel_size, 2 * scores.shape[-1] + 1)  # a wider one sees no more
    return pool(scores, kernel, stride=1, padding=kernel // 2)

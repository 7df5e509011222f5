from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View, setting
from kv_lm_eval.methods.voting import Voting, pooled

if TYPE_CHECKING:
    from kv_lm_eval.cache.facts import ModelFacts


class SnapKV(Voting):
    """The last window_size queries vote: tokens (and their neighbours) that they attend to stay, and the window itself.

    Paper: arXiv:2404.14469, section 4. Reference: FasterDecoding/SnapKV, snapkv/monkeypatch/snapkv_utils.py.
    Defaults: those of the LongBench configurations (window 32, kernel 7, max pooling).
    Deviations: gqa=kv_head makes one choice per KV head, by the mean over its query heads; gqa=query_head is the
    original, which repeats keys and values and chooses per query head: a cache G times as large, counted as such. Votes
    are summed in float32; ties go to the older token.
    """

    paper = "arXiv:2404.14469"

    pooling: str = setting("max", "how votes are pooled", ("max", "avg"))
    gqa: str = setting("kv_head", "who chooses; query heads: from a cache repeated for each", ("kv_head", "query_head"))

    def validate(self) -> None:
        super().validate()
        if self.kernel_size == 1 and self.pooling != "max":
            raise UserError(f"pooling={self.pooling} has no effect with kernel_size=1, which pools nothing")

    @property
    def per_query_head(self) -> bool:
        return self.gqa == "query_head"

    def warnings(self, facts: ModelFacts) -> list[str]:
        groups = [getattr(module, "num_key_value_groups", 1) for module in facts.modules.values()]
        if self.per_query_head and groups and max(groups) == 1:
            return ["gqa=query_head has no effect: the model has as many KV heads as query heads"]
        return []

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the window always, then the votes, pooled over neighbours."""
        recent = view.recent(self.window_size)
        votes = self.weights(view).masked_fill(recent, 0.0)
        return pooled(votes, self.kernel_size, self.pooling).masked_fill(recent, float("inf"))

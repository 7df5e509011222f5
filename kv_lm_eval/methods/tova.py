from torch import Tensor

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting


class TOVA(Method):
    """Token Omission Via Attention: the last query's attention, averaged over all heads of a layer, decides.

    Every head of a layer keeps the same tokens. Works at every step: the cache is an RNN-like state of fixed size.

    Paper: arXiv:2401.06104, section 3. Reference: schwartz-lab-NLP/TOVA.
    Deviations: none in the rule (recent_protected=1 keeps the newest token whatever its weight, as kvpress does); the
    prompt's own forward is full attention with one cut after it.
    """

    paper = "arXiv:2401.06104"
    presets = {"compress_every": 1}
    slotwise = True
    evicts_in_prefill = True

    recent_protected: int = setting(0, "most recent tokens that always stay")

    def validate(self) -> None:
        if self.recent_protected < 0:
            raise UserError(f"recent_protected={self.recent_protected} is negative; 0 protects none")

    @property
    def protected(self) -> int:
        return self.recent_protected

    @property
    def num_queries(self) -> int:
        return 1

    @property
    def heads_alike(self) -> bool:
        return True

    def weights(self, view: View) -> Tensor:
        """[B, K, N]: the last query's attention, mean over the query heads of a group."""
        return view.votes(1)

    def score(self, view: View) -> Tensor:
        """[B, 1, N]: the last query's attention, mean over all heads."""
        scores = self.weights(view).mean(1, keepdim=True)
        return scores.masked_fill(view.recent(self.recent_protected)[:, :1], float("inf"))

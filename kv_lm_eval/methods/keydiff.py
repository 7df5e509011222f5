from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kv_lm_eval.cache.transfer import at_least_float32
from kv_lm_eval.methods.base import Method, View


class KeyDiff(Method):
    """Keys that differ most in direction from the mean key stay: geometrically distinct keys are the important ones.

    Paper: arXiv:2504.15364, equation 5. Reference: NVIDIA/kvpress, presses/keydiff_press.py.
    Deviations: none (one choice per KV head, unit keys averaged over the slots that are not empty).
    """

    paper = "arXiv:2504.15364"
    evicts_in_prefill = True

    def score(self, view: View) -> Tensor:
        real = (view.pos >= 0).unsqueeze(-1)
        keys = normalize(at_least_float32(view.keys), dim=-1)
        anchor = (keys * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)
        scores = -cosine_similarity(keys, anchor, dim=-1)
        return scores.masked_fill(real.squeeze(-1).sum(-1, keepdim=True) <= 2, 0.0)  # of two, both differ as much

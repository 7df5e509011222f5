from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

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
        keys = normalize(view.keys.float(), dim=-1)
        anchor = (keys * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)
        return -cosine_similarity(keys, anchor, dim=-1)

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kv_lm_eval.cache.transfer import sum_dtype
from kv_lm_eval.methods.base import Method, View

BLOCK = 4096  # keys read in float64 at a time


class KeyDiff(Method):
    """Keys that differ most in direction from the mean key stay: geometrically distinct keys are the important ones.

    Two keys are equally far from their mean, and so may others be. Distances are computed in float64 and compared in
    float32, so that such tokens tie, and the older one stays, whatever the rounding.

    Paper: arXiv:2504.15364, equation 5. Reference: NVIDIA/kvpress, presses/keydiff_press.py.
    Deviations: none (one choice per KV head, unit keys averaged over the slots that are not empty).
    """

    paper = "arXiv:2504.15364"
    evicts_in_prefill = True

    def score(self, view: View) -> Tensor:
        """[B, K, N]: minus the cosine between each key and the mean direction of its head's keys."""
        wide = sum_dtype(view.keys.device)
        blocks, real = view.keys.split(BLOCK, dim=2), (view.pos >= 0).unsqueeze(-1).split(BLOCK, dim=2)
        anchor = torch.zeros_like(view.keys[:, :, :1], dtype=wide)
        for keys, there in zip(blocks, real, strict=True):
            anchor += normalize(keys.to(wide), dim=-1).masked_fill(~there, 0.0).sum(2, keepdim=True)
        return -torch.cat([cosine_similarity(keys.to(wide), anchor, dim=-1) for keys in blocks], dim=2).float()

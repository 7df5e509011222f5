from __future__ import annotations

import torch
from torch import Tensor

from kv_lm_eval.cache.transfer import at_least_float32, sum_dtype
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, levelled, setting

RIDGE = 1e-2  # added to the diagonal before it is inverted


class Leverage(Method):
    """Tokens whose keys say what the others do not: statistical leverage of the keys before their rotation.

    Keys X of a head, turned back to position 0, centred, and multiplied by a random matrix of sketch_dimension columns,
    have the leverage scores diag(X (X'X)^-1 X'). The geometric part of Compactor, by itself: no attention, no question.

    Paper: arXiv:2507.08143 (Compactor), section 3. Reference: NVIDIA/kvpress, presses/leverage_press.py.
    Deviations: the random matrix is drawn from (seed, layer), the same for all rows and heads, so that a run can be
    repeated (kvpress draws one a head at every call: its kept sets change from run to run); with no more channels than
    sketch_dimension there is none. The scores of kvpress are these, centred and scaled over the layer, which leaves
    their order.
    """

    paper = "arXiv:2507.08143"
    rotates = True

    sketch_dimension: int = setting(48, "columns of the random matrix; no fewer than a key has channels: none is used")
    seed: int = setting(0, "another seed, another random matrix")

    def validate(self) -> None:
        check_sketch(self.sketch_dimension)

    def score(self, view: View) -> Tensor:
        """[B, K, N]: leverage of each key among those of its head."""
        return leverage(view, self.sketch_dimension, self.seed, view.pos >= 0)


def check_sketch(sketch_dimension: int) -> None:
    """Raises UserError for a sketch without columns."""
    if sketch_dimension < 1:
        raise UserError(f"sketch_dimension={sketch_dimension} must be at least 1: it is the number of columns")


def leverage(view: View, sketch_dimension: int, seed: int, counts: Tensor) -> Tensor:
    """Leverage scores of the keys before their rotation among those that count ([B, 1 or K, N]): [B, K, N] float32."""
    back = -view.pos.clamp_min(0)
    keys = view.rotate(at_least_float32(view.keys), back[:, 0] if back.shape[1] == 1 else back)
    there, size = counts.unsqueeze(-1), keys.shape[-1]
    if sketch_dimension < size:
        random = torch.Generator().manual_seed(1_000_003 * seed + view.layer)
        sketch = torch.randn(size, sketch_dimension, generator=random) * sketch_dimension**-0.5
        keys = keys @ sketch.to(keys.device, keys.dtype)
    x = keys.masked_fill(~there, 0.0)
    x = (x - x.sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp_min(1)).mul_(there)
    wide = sum_dtype(x.device)
    one = torch.eye(x.shape[-1], dtype=wide, device=x.device)
    lower = torch.linalg.cholesky((x.transpose(2, 3) @ x).to(wide) + RIDGE * one)
    inverse = torch.linalg.solve_triangular(lower, one, upper=False).to(x.dtype)
    return levelled((x @ inverse.transpose(2, 3)).square().sum(3))

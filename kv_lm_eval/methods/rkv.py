from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kv_lm_eval.cache.transfer import at_least_float32
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View, setting
from kv_lm_eval.methods.voting import Voting, pooled

ELEMENTS = 2**20  # similarities held at a time: few enough to stay in a processor's cache


class RKV(Voting):
    """Tokens that the last queries attend to and whose keys are not said again by others stay: for long answers.

    Importance: logits of the window's queries, the largest of a group's query heads, softmaxed over the tokens before
    the window, mean over the queries, max-pooled. Redundancy: cosines between all keys, the diagonal 0 and in each row
    the newest key over the threshold 0 (of tokens that say the same, the newest is not redundant); their mean over the
    rows, softmaxed. Score: mix_lambda * importance - (1 - mix_lambda) * redundancy. The window always stays.

    Paper: arXiv:2505.24133 (R-KV), section 3. Reference: Zefan-Cai/R-KV, rkv/compression/r1_kv.py.
    Deviations: the prompt is cut at its end too, then every compress_every tokens of the answer, 128 as published. In a
    row without a key over the threshold the first key's cosine is 0, as in the reference, though not in the paper. The
    cosines of N tokens are N x N, computed in blocks: as much work as attention without a mask, in KV heads.
    """

    paper = "arXiv:2505.24133"
    presets = {"compress_every": 128}

    window_size: int = setting(8, "observation window: last queries that vote, always kept")
    mix_lambda: float = setting(0.07, "weight of importance, the rest is redundancy's")
    similarity_threshold: float = setting(0.5, "cosine over which two keys say the same")

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.mix_lambda <= 1:
            raise UserError(f"mix_lambda={self.mix_lambda:g} is outside [0, 1]: it is the share of importance")
        if not -1 <= self.similarity_threshold <= 1:
            raise UserError(f"similarity_threshold={self.similarity_threshold:g} is outside [-1, 1]: it is a cosine")

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the window always, then importance less redundancy."""
        recent = view.recent(self.window_size)
        mixed = self.mix_lambda * self._importance(view, recent) - (1 - self.mix_lambda) * self._redundancy(view)
        return mixed.masked_fill(recent, float("inf"))

    def _importance(self, view: View, recent: Tensor) -> Tensor:
        """[B, K, N]; recent: [B, 1 or K, N] the window's own slots, which do not count."""
        hidden = (recent | (view.pos < 0)).unsqueeze(2)
        logits = view.logits(self.window_size).amax(2).masked_fill(hidden, float("-inf"))  # [B, K, W, N]
        there = (logits > float("-inf")).any(-1, keepdim=True)  # queries that see a token before the window
        weights = logits.masked_fill(~there, 0.0).softmax(-1) * there
        mean = weights.sum(2) / there.sum(2).clamp_min(1)
        return pooled(mean, self.kernel_size, "max")

    def _redundancy(self, view: View) -> Tensor:
        """[B, K, N]: how much the other keys resemble each, as shares of 1."""
        b, k, n, _ = view.keys.shape
        real = (view.pos >= 0).expand(b, k, n)
        keys = F.normalize(at_least_float32(view.keys), dim=-1, eps=1e-8).masked_fill(~real.unsqueeze(-1), 0.0)
        place = torch.arange(n, device=keys.device, dtype=torch.int32)
        first = real.int().argmax(-1, keepdim=True).unsqueeze(-1)
        total = keys.new_zeros(b, k, n)
        block = max(1, ELEMENTS // (b * k * n))
        for start in range(0, n, block):
            rows = keys[:, :, start : start + block] @ keys.transpose(2, 3)  # [B, K, x, N]
            rows.diagonal(start, 2, 3).zero_()
            newest = torch.where(rows > self.similarity_threshold, place, -1).amax(-1, keepdim=True)
            rows.scatter_(3, torch.where(newest < 0, first, newest.long()), 0.0)
            total += rows.sum(2)
        mean = total / real.sum(-1, keepdim=True).clamp_min(1)
        return mean.masked_fill(~real, float("-inf")).softmax(-1)

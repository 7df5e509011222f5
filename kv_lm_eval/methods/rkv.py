from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kv_lm_eval.cache.store import rows_of
from kv_lm_eval.cache.transfer import at_least_float32, sum_dtype
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View, setting
from kv_lm_eval.methods.voting import Voting, pooled

BLOCK = 256  # keys that are asked at a time, on a CPU: their cosines with all others stay near it


class RKV(Voting):
    """Tokens that the last queries attend to and whose keys are not said again by others stay: for long answers.

    Importance: logits of the window's queries, the largest of a group's query heads, softmaxed over the tokens before
    the window, mean over the queries, max-pooled. Redundancy: cosines between all keys, the diagonal 0 and in each row
    the newest key over the threshold 0 (of tokens that say the same, the newest is not redundant); their mean over the
    rows, softmaxed. Score: mix_lambda * importance - (1 - mix_lambda) * redundancy. The window always stays.

    Paper: arXiv:2505.24133 (R-KV), section 3. Reference: Zefan-Cai/R-KV, rkv/compression/r1_kv.py.
    Deviations: the prompt is cut at its end too, then every compress_every tokens of the answer, 128 as published. In a
    row without a key over the threshold the first key's cosine is 0, as in the reference, though not in the paper. Of
    N x N cosines only those are computed that tell the newest over the threshold: few where most keys resemble a new
    one, half of them where none does.
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
        """[B, K, N]: how much the other keys resemble each, as shares of 1.

        What all rows of cosines add up to is the product of each key with the sum of all; single cosines are needed
        only where they do not count: of a key with itself, and of each row's newest over the threshold.
        """
        b, k, n, _ = view.keys.shape
        real = (view.pos >= 0).expand(b, k, n)
        keys = F.normalize(at_least_float32(view.keys), dim=-1, eps=1e-8).masked_fill(~real.unsqueeze(-1), 0.0)
        newest = torch.stack([self._newest(own) for own in keys.flatten(0, 1)]).view(b, k, n)
        newest = torch.where(newest < 0, real.int().argmax(-1, keepdim=True), newest)
        wide = sum_dtype(keys.device)
        own = keys.square().sum(-1)
        total = ((keys @ keys.sum(2, dtype=wide).to(keys.dtype).unsqueeze(3)).squeeze(3) - own).to(wide)
        left_out = rows_of(keys, newest).mul_(keys).sum(-1)
        left_out.masked_fill_(newest == torch.arange(n, device=keys.device), 0.0)  # itself, which is left out already
        total.scatter_add_(2, newest, -left_out.to(wide))
        mean = (total / real.sum(-1, keepdim=True).clamp_min(1)).to(keys.dtype)
        return mean.masked_fill(~real, float("-inf")).softmax(-1)

    def _newest(self, keys: Tensor) -> Tensor:
        """[N]: for each of one head's unit keys [N, D] the newest other one over the threshold, -1 where none is.

        The newest keys are asked first, by those that have found none yet. As long as these are most, one product
        serves both sides of a pair.
        """
        n, device = len(keys), keys.device
        found = torch.full((n,), -1, device=device)
        block = min(BLOCK if device.type == "cpu" else 8 * BLOCK, max(32, n // 8))
        for end in range(n, 0, -block):
            start = max(0, end - block)
            rows = (found[:end] < 0).nonzero().squeeze(1)
            most = 2 * len(rows) > end
            rows = torch.arange(end, device=device) if most else rows
            cosines = (keys[:end] if most else keys[rows]) @ keys[start:end].T
            new = (rows >= start).nonzero().squeeze(1)
            cosines[new, rows[new] - start] = 0.0
            self._note(found, rows, cosines, start)
            if most:
                self._note(found, torch.arange(start, end, device=device), cosines[:start].T, 0)
            elif len(rows := start + (found[start:end] < 0).nonzero().squeeze(1)):
                self._note(found, rows, keys[rows] @ keys[:start].T, 0)
        return found

    def _note(self, found: Tensor, rows: Tensor, cosines: Tensor, first: int) -> None:
        """Where a row [x] has found no key yet: the newest over the threshold by its cosines [x, n] with those from
        `first` on."""
        if not cosines.numel():
            return
        over = ((cosines.amax(1) > self.similarity_threshold) & (found[rows] < 0)).nonzero().squeeze(1)
        place = torch.arange(first, first + cosines.shape[1], device=found.device, dtype=torch.int32)
        newest = torch.where(cosines[over] > self.similarity_threshold, place, -1).amax(1)
        found[rows[over]] = newest.to(found.dtype)

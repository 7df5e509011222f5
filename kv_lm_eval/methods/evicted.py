"""What becomes of the REST: the pairs that were not kept."""

from __future__ import annotations

import torch

from kv_lm_eval.methods.base import View


class Evicted:
    """Treatment of the evicted pairs: may change what the kept ones hold before the others go."""

    def treat(self, view: View, index: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and values of the kept slots, [B, K, M, D] each.

        Args:
            view: all slots of the layer before the cut.
            index: [B, 1 or K, M] kept slots, in order of position, empty ones (to be ignored) first.
            valid: [B, 1 or K, M] False where the entry of `index` is empty.
        """
        raise NotImplementedError


class Drop(Evicted):
    """Evicted pairs are gone: the treatment of nearly all published methods."""

    def treat(self, view: View, index: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gather_slots(view.keys, index), gather_slots(view.values, index)


def gather_slots(slots: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Slots [B, K, N, D] at index [B, 1 or K, M] -> [B, K, M, D]."""
    expanded = index.unsqueeze(-1).expand(-1, slots.shape[1], -1, slots.shape[3])
    return slots.gather(2, expanded)

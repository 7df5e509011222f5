"""Where an answer ends, for each row of a batch by itself.

lm-eval's criteria end a batch when all of its rows have met one and the same stop. Until then the other rows go on, and
what they say after their own stop stays in the answer where the stop has no text, as that of a special token. Here the
same criteria note when each row meets its first stop, and the row's answer ends there, as it does alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import StoppingCriteria


class Stops(StoppingCriteria):
    """lm-eval's stopping criteria, and where each row ends.

    Args:
        until: strings that end an answer. end_tokens: tokens that do.
        width: columns before the first new token. rows: prompts of the batch.
        beams: of a search, in which stops are lm-eval's alone: what is looked at need not be what is returned.
    """

    def __init__(
        self,
        tokenizer: Any,
        until: Sequence[str],
        end_tokens: Collection[int],
        width: int,
        rows: int,
        beams: int = 1,
    ) -> None:
        assert rows == 1 or beams == 1, "lm-eval looks at the first beam of the first prompts"
        self._criteria = stop_sequences_criteria(tokenizer, list(until), width, rows)
        self._end_tokens, self._width, self._beams = set(end_tokens), width, beams
        self._after: list[int | None] = [None] * rows  # new tokens up to the first stop string

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[B] bool: the rows that have met a stop string; of beams lm-eval's verdict, one for all."""
        done = [bool(criterion(input_ids, scores)) for criterion in self._criteria]
        for b, known in enumerate(self._after):
            if known is None and any(criterion.done_tracker[b] for criterion in self._criteria):
                self._after[b] = input_ids.shape[1] - self._width
        if self._beams > 1:
            return torch.full((input_ids.shape[0],), any(done), dtype=torch.bool, device=input_ids.device)
        return torch.tensor([known is not None for known in self._after], device=input_ids.device)

    def own(self, row: int, new: list[int]) -> list[int]:
        """Of the row's new tokens those that it would have had alone, its stop included."""
        end = next((i + 1 for i, token in enumerate(new) if token in self._end_tokens), len(new))
        return new[: min(end, self._after[row] or end)] if self._beams == 1 else new[:end]

"""One generate_until request as it is run."""

from __future__ import annotations

from dataclasses import dataclass

from kv_lm_eval.requests.boundaries import Boundary
from kv_lm_eval.requests.gen_settings import GenSettings


@dataclass(frozen=True)
class Prompt:
    """One request as it is run: its number in the call, its tokens after any truncation, what its answer may be."""

    i: int
    ids: list[int]
    settings: GenSettings
    boundary: Boundary | None  # with question_in_prompt=False

    @property
    def most_tokens(self) -> int:
        """Prompt and answer."""
        return self.settings.max_length or len(self.ids) + self.settings.max_new_tokens

    @property
    def head(self) -> list[int]:
        """Tokens that are compressed before the question is seen; none where it is compressed with them."""
        return self.ids[: len(self.ids) - self.tail] if self.boundary else []

    @property
    def tail(self) -> int:
        """Tokens fed after the compression; 0 where the whole prompt is compressed."""
        return min(len(self.ids), self.boundary.tail_tokens) if self.boundary else 0

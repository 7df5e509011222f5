"""WHEN the cache is cut: after the prefill, and then every R tokens or never again.

Time t counts the tokens that a row was fed since its prefill ended (since its first token, where a whole document
is streamed). A cut happens after the forward of token t where t is a multiple of R, so a forward over a segment that
ends at such a t equals the token-by-token run for every method.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kv_lm_eval.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Cut after the prefill, and every `compress_every` tokens from then on; some layers never."""

    compress_every: int = field(
        default=0, metadata={"help": "cut again every this many tokens fed after the prefill; 0: never again"}
    )

    skip_layers: tuple[int, ...] = field(
        default=(), metadata={"help": "indices of layers that are never cut, as [0,1] or 0"}
    )

    def __post_init__(self) -> None:
        if self.compress_every < 0:
            raise UserError(f"compress_every={self.compress_every} is negative; 0 means 'only after the prefill'")
        if any(layer < 0 for layer in self.skip_layers):
            raise UserError(f"skip_layers={list(self.skip_layers)}: layers are counted from 0")

    @property
    def online(self) -> bool:
        """Whether cuts go on after the prefill."""
        return self.compress_every > 0

    def due(self, before: int, after: int) -> bool:
        """Whether a cut follows a forward that took the clock from `before` to `after` tokens."""
        return self.online and before // self.compress_every < after // self.compress_every

    def until_due(self, t: int) -> int:
        """Tokens that may be fed in one forward from t on, so that it ends at the next cut."""
        assert self.online
        return self.compress_every - t % self.compress_every

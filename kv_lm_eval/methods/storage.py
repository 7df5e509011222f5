"""IN WHAT FORM the pairs that stay are held: as the model made them, or in a few bits each."""

from __future__ import annotations

from dataclasses import dataclass, field

from kv_lm_eval.errors import UserError

BITS = (2, 4, 8)  # that a number may be held in


@dataclass(frozen=True)
class Storage:
    """Keys and values in nbits each, but for the newest ones; 0: all in the model's own number format.

    Numbers of a group share a smallest value and a step, and each is a whole number of steps. A group is `group_size`
    consecutive pairs of one channel (axis "channel": keys have channels that are large in every token), or `group_size`
    neighbouring channels of one pair (axis "token"). The newest `residual_length` pairs, and up to 2 * group_size - 1
    more that wait for their group to be full, stay as they are.

    Paper: arXiv:2402.02750 (KIVI), section 3. Reference: jy-yuan/KIVI, models/llama_kivi.py.
    Deviations: keys and values leave the residual together, in whole groups, each time the row has seen a multiple of
    group_size tokens (KIVI: keys residual_length at a time, values one by one), so that the residual is never shorter
    than residual_length; residual and groups are counted in pairs that a head still holds, whatever was evicted between
    them.
    """

    nbits: int = field(
        default=0,
        metadata={"help": "bits of each stored key and value number; 0: not quantised", "choices": (0, *BITS)},
    )
    group_size: int = field(default=32, metadata={"help": "nbits: numbers that share a scale and a zero"})
    residual_length: int = field(
        default=128, metadata={"help": "nbits: newest pairs per KV head that stay in the model's number format"}
    )
    key_axis: str = field(
        default="channel",
        metadata={
            "help": "nbits: groups of keys lie along one channel or in one token",
            "choices": ("channel", "token"),
        },
    )
    value_axis: str = field(
        default="token", metadata={"help": "nbits: the same for values", "choices": ("channel", "token")}
    )

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise UserError(f"group_size={self.group_size} must be at least 1: it counts numbers that share a scale")
        if self.residual_length < 0:
            raise UserError(f"residual_length={self.residual_length} is negative; it counts pairs, 0 or more")

    @property
    def quantises(self) -> bool:
        return self.nbits > 0

    def due(self, before: int, after: int) -> bool:
        """Whether a row that has now seen `after` tokens, `before` of them until its last forward, moves full groups
        out of the residual: a clock of the row's own, the same whatever batch or segment its tokens come in."""
        return before // self.group_size < after // self.group_size

    def until_due(self, seen: int) -> int:
        """Tokens that a row may be fed in one forward so that it ends where the next pairs are quantised."""
        return self.group_size - seen % self.group_size

"""Keys with fewer channels: those that queries ask for least are not held.

Shapes: B batch rows, K KV heads, H query heads, n pairs, D head size, C channels kept, W last queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kv_lm_eval.cache.coded import BLOCK_SLOTS, Coded
from kv_lm_eval.cache.transfer import at_least_float32, sum_dtype
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.storage import KEY, Apart, Calibrated, coding, residual


@dataclass(frozen=True)
class Think(Calibrated):
    """Keys without the channels that queries ask for least, but for the newest pairs; values stay whole.

    A channel of a KV head is worth its mean square in the last channel_queries queries of the group, times its mean
    square in all keys that are held: the size of what it adds to their products. The key_channel_ratio * head size
    channels that are worth least are removed, of equal ones the later: a key is then held as the numbers of the other
    channels, and each head has a list of these, of a byte a channel. The newest residual_length pairs are whole. Which
    channels stay is chosen once for each head, after the cut that follows a prompt, or when the row has seen
    calibration_tokens; pairs that leave the newest ones later lose the same channels, every code_every tokens. What is
    removed counts as 0, so that a query's product with such a key is the one of the channels that stay.

    Paper: arXiv:2407.21018 (ThinK), section 3. Reference: SalesforceAIResearch/ThinK, kv_pruning_utils.py;
    NVIDIA/kvpress, think_press.py (which zeroes them, in the newest pairs too).
    Deviations: one set for each KV head, by all query heads of its group, as in kvpress (the authors repeat keys for
    each query head). Pairs of an answer lose channels as they age (the authors leave them whole). Nothing is removed
    before the row has seen calibration_tokens. A layer is read back with zeros for its attention.
    """

    asked_by = ("key_channel_ratio",)
    does = "removes channels of keys"

    residual_length: int = residual(32)
    code_every: int = coding(32)
    key_channel_ratio: float = field(
        default=0.4, metadata={"help": "think: share of a key's channels that is removed", "shown": (0.25, 0.5, 0.75)}
    )
    channel_queries: int = field(default=32, metadata={"help": "think: last queries that channels are chosen by"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.key_channel_ratio < 1:
            raise UserError(
                f"key_channel_ratio={self.key_channel_ratio:g} is outside (0, 1): it is the share of a key's channels "
                "that is removed"
            )
        if self.channel_queries < 1:
            raise UserError(
                f"channel_queries={self.channel_queries} must be at least 1: some query says what is asked for"
            )

    @property
    def quantises(self) -> bool:
        return True

    @property
    def step(self) -> int:
        return 1  # at the end of a prompt exactly residual_length pairs are whole

    @property
    def words(self) -> str:
        return f"key_channel_ratio={self.key_channel_ratio:g}"

    @property
    def keys(self) -> Channels:
        return Channels(self.key_channel_ratio)

    @property
    def values(self) -> Whole:
        return Whole()

    def check(self, size: int) -> None:
        if not int(size * self.key_channel_ratio):
            raise UserError(
                f"key_channel_ratio={self.key_channel_ratio:g} of {size} channels is none: nothing would be removed; "
                f"take at least 1/{size}"
            )

    @property
    def watches(self) -> int:
        return self.channel_queries

    def settings(self) -> dict[str, Any]:
        return {KEY: self.name, **super().settings()}

    def of_queries(self, keys: torch.Tensor, real: torch.Tensor, queries: torch.Tensor) -> dict[str, torch.Tensor]:
        """The channels that stay, [B, K, C]: by keys [B, K, N, D] that are real [B, K, N] and queries [B, H, W, D]."""
        everywhere = queries.new_ones(queries.shape[:3], dtype=torch.bool)
        of_heads = mean_squares(queries, everywhere)  # [B, H, D]
        wanted = of_heads.unflatten(1, (keys.shape[1], -1)).mean(2)
        return {"channels": self.keys.best(wanted * mean_squares(keys, real))}


@dataclass(frozen=True)
class Channels(Apart):
    """Of every key the numbers of its head's channels, which are listed once."""

    ratio: float

    block = 1

    def best(self, worth: torch.Tensor) -> torch.Tensor:
        """The channels that stay, [B, K, C] ascending, of worth [B, K, D]."""
        size = worth.shape[-1]
        order = worth.argsort(dim=-1, descending=True, stable=True)[..., : size - int(size * self.ratio)]
        return order.sort(dim=-1).values.to(torch.uint8 if size <= 256 else torch.int16)

    def of_head(
        self, x: torch.Tensor, real: torch.Tensor, before: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The channels of each head, [B, K, C], as they were `before`; where no query has been seen, by the keys alone:
        x [B, K, n, D] that are real [B, K, n]."""
        return dict(before) or {"channels": self.best(mean_squares(x, real))}

    def encode(self, x: torch.Tensor, real: torch.Tensor, of_head: dict[str, torch.Tensor]) -> Coded:
        """The channels that stay of x [B, K, n, D], whether a pair is real [B, K, n] or not."""
        held = x.gather(3, _everywhere(of_head["channels"], x.shape[2]))
        return Coded(self, x.shape[3], x.dtype, {"keys": held}, of_head)

    def decode(self, part: Coded) -> torch.Tensor:
        """The keys with zeros in the place of what was removed, [B, K, n, D]."""
        held = part.of_pair["keys"]
        out = held.new_zeros(*held.shape[:3], part.size)
        return out.scatter_(3, _everywhere(part.of_head["channels"], held.shape[2]), held)


@dataclass(frozen=True)
class Whole(Apart):
    """Pairs as they are."""

    block = 1

    def encode(self, x: torch.Tensor, real: torch.Tensor, of_head: dict[str, torch.Tensor]) -> Coded:
        """A copy of x [B, K, n, D], whether a pair is real [B, K, n] or not."""
        return Coded(self, x.shape[3], x.dtype, {"values": x.clone()})

    def decode(self, part: Coded) -> torch.Tensor:
        """The pairs, [B, K, n, D]."""
        return part.of_pair["values"]


def mean_squares(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Of each channel of vectors x [B, K, n, D], over those that are real [B, K, n]: [B, K, D]."""
    total = x.new_zeros(*x.shape[:2], x.shape[3], dtype=sum_dtype(x.device))
    for part, there in zip(x.split(BLOCK_SLOTS, dim=2), real.split(BLOCK_SLOTS, dim=2), strict=True):
        total += at_least_float32(part).square().masked_fill(~there.unsqueeze(-1), 0.0).sum(2, dtype=total.dtype)
    return total / real.sum(-1, keepdim=True).clamp_min(1)


def _everywhere(channels: torch.Tensor, pairs: int) -> torch.Tensor:
    """Channels [B, K, C] of each of so many pairs: [B, K, n, C]."""
    return channels.long().unsqueeze(2).expand(-1, -1, pairs, -1)

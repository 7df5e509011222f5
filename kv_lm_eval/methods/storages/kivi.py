"""Numbers as whole steps between the smallest and the largest of their group.

Shapes: B batch rows, K KV heads, n pairs, T groups, D head size, P groups across a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kv_lm_eval.cache.coded import Coded, narrow, pack, unpack
from kv_lm_eval.cache.store import rows_of
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.storage import Apart, Storage, residual

BITS = (2, 3, 4, 8)  # that a number may be held in
AXES = ("channel", "token")


@dataclass(frozen=True)
class Kivi(Storage):
    """Keys and values in nbits each, but for the newest ones; 0: all in the model's own number format.

    Numbers of a group share a smallest value and a step, and each is a whole number of steps. A group is `group_size`
    consecutive pairs of one channel (axis "channel": keys have channels that are large in every token), or `group_size`
    neighbouring channels of one pair (axis "token"). The newest `residual_length` pairs, and up to 2 * group_size - 1
    more that wait for their group to be full, stay as they are. A group's scale and zero are float16.

    Paper: arXiv:2402.02750 (KIVI), section 3. Reference: jy-yuan/KIVI, models/llama_kivi.py.
    Deviations: keys and values leave the residual together, in whole groups, each time the row has seen a multiple of
    group_size tokens (KIVI: keys residual_length at a time, values one by one), so that the residual is never shorter
    than residual_length; residual and groups are counted in pairs that a head still holds, whatever was evicted between
    them.
    """

    asked_by = ("nbits", "k_bits", "v_bits")

    residual_length: int = residual(128)
    nbits: int = field(
        default=0,
        metadata={
            "help": "bits of each stored key and value number; 0: not quantised",
            "choices": (0, *BITS),
            "shown": BITS,
        },
    )
    k_bits: int | None = field(default=None, metadata={"help": "nbits of keys alone", "choices": BITS})
    v_bits: int | None = field(default=None, metadata={"help": "nbits of values alone", "choices": BITS})
    group_size: int = field(default=32, metadata={"help": "nbits: numbers that share a scale and a zero"})
    key_axis: str = field(
        default="channel",
        metadata={"help": "nbits: groups of keys lie along one channel or in one token", "choices": AXES},
    )
    value_axis: str = field(default="token", metadata={"help": "nbits: the same for values", "choices": AXES})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1:
            raise UserError(f"group_size={self.group_size} must be at least 1: it counts numbers that share a scale")
        for own, other, which in (("k_bits", "v_bits", "values"), ("v_bits", "k_bits", "keys")):
            if getattr(self, own) and not (getattr(self, other) or self.nbits):
                raise UserError(f"{own}={getattr(self, own)} without bits for {which}: give {other} too, or nbits")

    @classmethod
    def example(cls) -> dict[str, Any]:
        return {"nbits": 4, "residual_length": 32}

    @property
    def quantises(self) -> bool:
        return bool(self.nbits or self.k_bits)

    @property
    def words(self) -> str:
        return f"nbits={self.nbits}" if self.nbits else f"k_bits={self.k_bits}"

    @property
    def step(self) -> int:
        return self.group_size

    @property
    def waits(self) -> str:
        return f"group_size={self.group_size}"

    @property
    def keys(self) -> Grouped:
        return Grouped(self.k_bits or self.nbits, self.group_size, self.key_axis)

    @property
    def values(self) -> Grouped:
        return Grouped(self.v_bits or self.nbits, self.group_size, self.value_axis)


@dataclass(frozen=True)
class Grouped(Apart):
    """Codes of nbits, packed along the head, with a step and a smallest value in float16 for each group.

    With axis "channel" these are [B, K, T, D], and a pair has the number of its group; with axis "token", [B, K, n, P].
    """

    nbits: int
    width: int
    axis: str

    @property
    def block(self) -> int:
        return self.width

    def encode(self, x: torch.Tensor, real: torch.Tensor, of_head: dict[str, torch.Tensor]) -> Coded:
        """Codes x [B, K, n, D]; pairs that are not real [B, K, n] take no part in their group.

        Error: at most half a step of the group, and what float16 rounds off its scale and zero.
        """
        b, k, n, size = x.shape
        width, levels = self.width, 2**self.nbits - 1
        numbers = x.float().masked_fill(~real.unsqueeze(-1), 0.0)
        if self.axis == "channel":
            numbers = torch.nn.functional.pad(numbers, (0, 0, 0, -n % width))
            there = torch.nn.functional.pad(real, (0, -n % width)).view(b, k, -1, width, 1)
            grouped = numbers.view(b, k, -1, width, size)
            low = grouped.masked_fill(~there, float("inf")).amin(3, keepdim=True)
            high = grouped.masked_fill(~there, float("-inf")).amax(3, keepdim=True)
            low, high = (torch.where(there.any(3, keepdim=True), x, 0.0) for x in (low, high))
        else:
            width = min(width, size)
            last = numbers[..., -1:].expand(-1, -1, -1, -size % width)  # a short last group changes no minimum
            grouped = torch.cat([numbers, last], dim=-1).view(b, k, n, -1, width)
            low, high = grouped.amin(4, keepdim=True), grouped.amax(4, keepdim=True)
        zero = low.half()
        scale = ((high - zero.float()) / levels).clamp_min(0).half()
        step = torch.where(scale == 0, 1.0, scale.float())
        codes = ((grouped - zero.float()) / step).round().clamp(0, levels).to(torch.uint8)
        if self.axis == "channel":
            packed = pack(codes.view(b, k, -1, size)[:, :, :n], self.nbits)
            group = narrow(torch.arange(n, device=x.device) // width).expand(b, k, n).contiguous()
            of_group = {"scale": scale.squeeze(3), "zero": zero.squeeze(3)}
            return Coded(self, size, x.dtype, {"codes": packed}, of_group=of_group, group=group)
        packed = pack(codes.view(b, k, n, -1)[..., :size], self.nbits)
        return Coded(self, size, x.dtype, {"codes": packed, "scale": scale.squeeze(4), "zero": zero.squeeze(4)})

    def decode(self, part: Coded) -> torch.Tensor:
        """The pairs again, [B, K, n, D] float32."""
        codes = unpack(part.of_pair["codes"], self.nbits)[..., : part.size]
        return codes * self._spread(part, "scale") + self._spread(part, "zero")

    def _spread(self, part: Coded, name: str) -> torch.Tensor:
        """The entry of each number: [B, K, n, D] float32."""
        if part.group is not None:
            return rows_of(part.of_group[name], part.group.long()).float()
        width = min(self.width, part.size)
        return part.of_pair[name].float().repeat_interleave(width, dim=-1)[..., : part.size]

"""Numbers as floats of 8 bits, as inference engines hold them.

Shapes: B batch rows, K KV heads, n pairs, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kv_lm_eval.cache.coded import Coded
from kv_lm_eval.methods.storage import Apart, Calibrated

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LEAST_SCALE = 1e-6  # of a token's own scale, as in vLLM


@dataclass(frozen=True)
class Fp8(Calibrated):
    """Keys and values as floats of 8 bits: 4 bits of exponent and 3 of mantissa, or 5 and 2, times a scale.

    A number x is held as x / scale in float32, rounded to the nearest float of 8 bits (of two equally near ones the
    even) and limited to the largest finite one; it is read as that times the scale, in the model's number format.

    `fp8_scale` says what a scale is for. "head": one float32 for the keys and one for the values of each KV head, the
    largest absolute value among the first pairs that are coded over the largest float of 8 bits; it stays, and what is
    larger later is limited, as with vLLM's scales per attention head, which a calibration fixes. Nothing is coded
    before the row has seen calibration_tokens, or all of a longer prompt. "token": one for each pair and head, as
    `fp8_per_token_head` has it. "unit": 1, vLLM's own where no scales were calibrated.

    Reference: vllm-project/vllm, csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh (a number), llm-compressor (scales
    per head), vllm/v1/attention/ops/triton_reshape_and_cache_flash.py (scales per token and head).
    Deviations: a head's scale comes from the row's own tokens, not from a data set beforehand. A pair is coded after
    the forward that it came in; vLLM's attention reads it coded at once. vLLM has scales per token and head for e4m3.
    """

    variants = {
        "fp8_e4m3": {"fp8_format": "e4m3"},
        "fp8_e5m2": {"fp8_format": "e5m2"},
        "fp8_per_token_head": {"fp8_scale": "token"},
    }

    fp8_format: str = field(
        default="e4m3", metadata={"help": "fp8: bits of exponent and mantissa", "choices": tuple(FORMATS)}
    )
    fp8_scale: str = field(
        default="head",
        metadata={"help": "fp8: what has a scale of its own; unit: nothing", "choices": ("head", "token", "unit")},
    )

    @property
    def first(self) -> int:
        return super().first if self.fp8_scale == "head" else 1

    @property
    def keys(self) -> Floats:
        return Floats(self.fp8_format, self.fp8_scale)

    @property
    def values(self) -> Floats:
        return self.keys


@dataclass(frozen=True)
class Floats(Apart):
    """A byte a number, with the scale of its head or its pair in float32."""

    format: str
    scale: str

    block = 1

    @property
    def largest(self) -> float:
        return torch.finfo(FORMATS[self.format]).max

    def _share(self, largest: torch.Tensor) -> torch.Tensor:
        """The scale under which a number [...] is the format's largest; a GPU would multiply by a Python number's
        inverse, whose rounding is another."""
        return largest / largest.new_tensor(self.largest)

    def of_head(
        self, x: torch.Tensor, real: torch.Tensor, before: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The scale of each head, [B, K], 0 as long as it has no pair: of pairs x [B, K, n, D] that are real [B, K, n],
        but for those that have one."""
        if self.scale != "head":
            return {}
        scale = self._share(x.abs().amax(-1).float().masked_fill(~real, 0.0).amax(-1))
        scale = torch.where(real.any(-1) & (scale == 0), 1.0, scale)  # all numbers are 0
        return {"scale": torch.where(before["scale"] > 0, before["scale"], scale) if before else scale}

    def encode(self, x: torch.Tensor, real: torch.Tensor, of_head: dict[str, torch.Tensor]) -> Coded:
        """A byte for each number of x [B, K, n, D], whether its pair is real [B, K, n] or not."""
        numbers, of_pair = x.float().masked_fill(~real.unsqueeze(-1), 0.0), {}
        if self.scale == "token":
            scale = self._share(numbers.abs().amax(-1)).clamp_min(LEAST_SCALE)
            of_pair["scale"] = scale
            numbers = numbers * (1.0 / scale).unsqueeze(-1)
        elif self.scale == "head":
            scale = of_head["scale"]
            numbers = numbers / torch.where(scale == 0, 1.0, scale)[..., None, None]
        codes = numbers.clamp(-self.largest, self.largest).to(FORMATS[self.format])
        return Coded(self, x.shape[3], x.dtype, {"codes": codes.view(torch.uint8), **of_pair}, of_head)

    def decode(self, part: Coded) -> torch.Tensor:
        """The pairs again, [B, K, n, D] float32."""
        numbers = part.of_pair["codes"].view(FORMATS[self.format]).float()
        if self.scale == "unit":
            return numbers
        each: Any = part.of_pair["scale"] if self.scale == "token" else part.of_head["scale"].unsqueeze(-1)
        return numbers * each.unsqueeze(-1)

"""Numbers on their way: small tensors that the host knows, for the device; sums in a format that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    """torch.tensor(values, device=device) that does not wait for the device's work, as that would in every layer of
    every step: numbers in pageable memory are copied aside before the call returns."""
    return torch.tensor(values).to(device, non_blocking=True)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in its own format where that is wider: what is added up or compared must not be rounded."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

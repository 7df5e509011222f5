"""Numbers on their way: small tensors that the host knows, for the device; sums in a format that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    """torch.tensor(values, device=device), [n], that does not wait for the device's work, as that would in every layer
    of every step: numbers in pageable memory are copied aside before the call returns."""
    return torch.tensor(values).to(device, non_blocking=True)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x [...] in float32 or its own format where that is wider: what is added up or compared must not be rounded."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sum_dtype(device: torch.device | str) -> torch.dtype:
    """The type in which sums are made that must not depend on the order of their terms, which a GPU chooses: float64,
    whose rounding disappears in the result's type. Apple's GPUs have no float64: there, float32, and a sum's last
    digits may differ from run to run."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64

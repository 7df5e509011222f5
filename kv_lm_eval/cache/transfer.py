"""Small tensors of numbers that the host knows, for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    """torch.tensor(values, device=device) that does not wait for the device's work, as that would in every layer of
    every step: numbers in pageable memory are copied aside before the call returns."""
    return torch.tensor(values).to(device, non_blocking=True)

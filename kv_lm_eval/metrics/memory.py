"""Peak memory above the weights, on CUDA devices; elsewhere it is not known, and None says so."""

from __future__ import annotations

import torch


class PeakMemory:
    """The peak since the last `restart`, summed over the CUDA devices of the model, without what `baseline` held."""

    def __init__(self, devices: set[torch.device]) -> None:
        self.devices = sorted((d for d in devices if d.type == "cuda"), key=str)
        self.baseline = sum(torch.cuda.memory_allocated(d) for d in self.devices)

    def restart(self) -> None:
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> int | None:
        """Bytes; None without a CUDA device."""
        if not self.devices:
            return None
        return max(0, sum(torch.cuda.max_memory_allocated(d) for d in self.devices) - self.baseline)

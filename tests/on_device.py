"""Where the tests' own models and tensors live: KV_TEST_DEVICE=cuda runs them on a GPU, `make test-cuda`.

What a test makes goes to that device. What the code under test makes stays where the code puts it, so that a tensor
that it leaves on the CPU meets one of the GPU, as it would at a user's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = os.environ.get("KV_TEST_DEVICE", "cpu")
_TESTS, _TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)


class TensorsOfTests(TorchFunctionMode):
    """Sends tensors that a file of the tests makes, without naming a device, to DEVICE."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function in _device_constructors() and kwargs.get("device") is None and _caller().startswith(_TESTS):
            return out.to(DEVICE)
        return out


def _caller() -> str:
    """The file of the first frame outside of torch and of this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(_TORCH)
    ):
        frame = frame.f_back
    return frame.f_code.co_filename

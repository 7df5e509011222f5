"""Shared by all tests: the helpers in this folder are importable, one thread, fixed seeds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    """Tiny models are slower on two threads than on one; a test that draws numbers draws the same each time."""
    torch = sys.modules.get("torch")  # tests of plain functions need not pay for importing it
    if torch is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)

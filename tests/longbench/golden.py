"""Where the official golden data lies, which the project may not carry: KV_LM_EVAL_DATA, else beside the checkout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
OWN = CHECKOUT / "tests" / "golden" / "longbench"
OFFICIAL = Path(os.environ.get("KV_LM_EVAL_DATA", CHECKOUT.parent / "shared" / "data")) / "longbench"

needs_official = pytest.mark.skipif(
    not OFFICIAL.is_dir(),
    reason="official LongBench data may not be redistributed: KV_LM_EVAL_DATA names the folder that has it",
)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]

from __future__ import annotations

from typing import Any

from kv_lm_eval.methods.snapkv import SnapKV


class ChunkKV(SnapKV):
    """SnapKV's votes for whole chunks of neighbouring tokens, the same in all heads of a layer (unit=chunk).

    unit=chunk, with unit_size=20 by default, does the same with the scores of any other method.

    Paper: arXiv:2502.00299, algorithm 1. Reference: NVIDIA/kvpress, presses/chunkkv_press.py.
    Deviations: those of snapkv; see `Unit` in unit.py for what becomes of room for less than a chunk. The reuse of one
    layer's choice in the next ones, which the paper offers to save time, is left out.
    """

    paper = "arXiv:2502.00299"
    presets = {"unit": "chunk"}

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {**super().example(slots), "unit_size": min(20, slots // 4)}

from __future__ import annotations

from typing import Any

from kv_lm_eval.methods.snapkv import SnapKV


class SnapKVComp(SnapKV):
    """SnapKV with compensation tokens: evicted pairs live on as one averaged pair a block, inside the budget.

    With block_size=full one pair stands for all that was evicted. Every block takes a slot from the kept tokens, which
    is the likely reason why small blocks lower the score.

    Reference: raetselhaftesKEN/SnapKV@3e98f87, snapkv_utils.py.
    Deviations: those of snapkv, and of `Compensate` in treatments/compensate.py.
    """

    presets = {"evicted": "compensate"}

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {**super().example(slots), "block_size": slots}

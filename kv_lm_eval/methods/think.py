from __future__ import annotations

from typing import Any

from kv_lm_eval.methods.base import Method


class Think(Method):
    """Nothing is evicted; keys lose the channels that the last queries ask for least, and values stay whole.

    key_channel_ratio is the share of a key's channels that is removed, for each KV head its own; the newest
    residual_length pairs are whole. What is removed is not held: at a ratio of 0.4, a key takes 0.6 of its bytes and a
    pair 0.8. Any other method takes the same setting: what it keeps then loses channels (method=snapkv,
    key_channel_ratio=0.4). It goes with no fewer bits beside it, since pairs are held in one form. Attention reads one
    layer at a time back with zeros: memory is saved, time is not.

    Paper: arXiv:2407.21018, section 3. Reference: SalesforceAIResearch/ThinK, kv_pruning_utils.py; NVIDIA/kvpress,
    think_press.py.
    Deviations: one set of channels for each KV head, by all query heads of its group; pairs of an answer lose channels
    as they age; nothing is removed before calibration_tokens have been seen, see `Storage`.
    """

    paper = "arXiv:2407.21018"
    presets = {"kv_cache_dtype": "think"}
    compresses = False

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {"key_channel_ratio": 0.5}

from __future__ import annotations

from typing import Any

from kv_lm_eval.methods.base import Method


class Quantized(Method):
    """Nothing is evicted; keys and values are held in a few bits each, but for the newest residual_length pairs.

    Any other method takes the same settings (nbits and so on): what it keeps is then quantised. Keys and values become
    whole numbers of steps between the smallest and the largest of their group, packed in bytes; scale and zero of a
    group are float16 and counted. Attention reads one layer at a time back into the model's number format: memory is
    saved, time is not.

    Paper: arXiv:2402.02750 (KIVI), section 3. Reference: jy-yuan/KIVI, models/llama_kivi.py.
    Deviations: the residual holds residual_length to residual_length + 2 * group_size - 1 pairs, see `Storage`.
    """

    paper = "arXiv:2402.02750"
    presets = {"nbits": 4}
    compresses = False

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {"nbits": 4, "residual_length": 32}

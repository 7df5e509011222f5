from kv_lm_eval.methods.snapkv import SnapKV


class PyramidKV(SnapKV):
    """SnapKV's votes with a budget that falls from the bottom layer to the top one (layer_budget=pyramid).

    Paper: arXiv:2406.02069, section 3. Reference: KVCache-Factory, pyramidkv_utils.py.
    Deviations: those of snapkv; see `Layers` in budget.py for the arithmetic of the layers.
    """

    paper = "arXiv:2406.02069"
    presets = {"layer_budget": "pyramid"}

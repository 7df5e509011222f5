from kv_lm_eval.methods.snapkv import SnapKV


class AdaKV(SnapKV):
    """SnapKV's votes with a layer's budget shared out among its KV heads by their scores (head_budget=ada).

    Heads really hold different numbers of pairs. The storage is a rectangle as long as the longest head, so valid and
    allocated bytes differ, and both are reported.

    Paper: arXiv:2407.11550, algorithm 1 (Ada-SnapKV). Reference: FFY0/AdaKV.
    Deviations: those of snapkv; see `Heads` in budget.py for the rounding of the safeguard.
    """

    paper = "arXiv:2407.11550"
    presets = {"head_budget": "ada"}

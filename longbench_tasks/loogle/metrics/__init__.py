"""LooGLE's automatic scores, a file each: NAMES, `score(prediction, reference) -> {name: value}`, `percent(values)`.

Reference: bigai-nlco/LooGLE, Evaluation/automatic_metrics.py and automatic_eval.py.
"""

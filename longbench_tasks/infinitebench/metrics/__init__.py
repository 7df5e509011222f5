"""InfiniteBench's scorers, one file each, as those of LongBench: `score(prediction, reference, all_classes)`.

Reference: OpenBMB/InfiniteBench, src/compute_scores.py. The F1 of En.QA is LongBench's (../../metrics/qa_f1.py), word
for word.
"""

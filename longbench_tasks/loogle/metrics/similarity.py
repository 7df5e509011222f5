"""Questions and summaries: BLEU-1, BLEU-4 and the recall of ROUGE-1, ROUGE-2 and ROUGE-L.

ROUGE is that of the package `rouge` 1.0.1 (../../metrics/rouge.py), BLEU that of nltk for one reference without
smoothing: BLEU-4 is the precision of four words alone, and next to nothing, not nothing, where none is shared.

Reference: bigai-nlco/LooGLE, Evaluation/automatic_metrics.py get_bleu_score, get_rouge_score.
Deviations: an answer of full stops alone, for which the package raises, and one that recurses too deep for it are
scored (0; what it is). METEOR, BERTScore and GPT-4's judgement are left out: the first depends on the order of Python's
sets and so on the process, the others on a model.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from ...metrics import rouge

NAMES = ("bleu1", "bleu4", "rouge1", "rouge2", "rougel")


def score(prediction: str, reference: str) -> dict[str, float]:
    """Each from 0 to 1; an empty answer is the word None."""
    prediction = prediction or "None"
    words, right = prediction.replace("\n", " ").split(), reference.replace("\n", " ").split()
    sentences, of_reference = rouge.sentences(prediction), rouge.sentences(reference)
    common = rouge.common_words(prediction, reference)
    return {
        "bleu1": bleu(words, right, 1),
        "bleu4": bleu(words, right, 4),
        "rouge1": _recall(sentences, of_reference, 1),
        "rouge2": _recall(sentences, of_reference, 2),
        "rougel": common[0] / common[1] if common else 0.0,
    }


def percent(values: Iterable[float]) -> float:
    """Aggregation."""
    return 100 * fmean(values)


def bleu(prediction: Sequence[str], reference: Sequence[str], n: int) -> float:
    """Precision of runs of n words, each as often as the reference has it, with the penalty for being short."""
    if not set(prediction) & set(reference):
        return 0.0
    made, wanted = Counter(_runs(prediction, n)), Counter(_runs(reference, n))
    precision = sum((made & wanted).values()) / max(1, sum(made.values())) or sys.float_info.min
    short = 1 if len(prediction) > len(reference) else math.exp(1 - len(reference) / len(prediction))
    return short * math.exp(math.log(precision))


def _recall(prediction: Sequence[Sequence[str]], reference: Sequence[Sequence[str]], n: int) -> float:
    """Share of the reference's runs of n words, each counted once, that the prediction has; across sentences too."""
    made = set(_runs([word for sentence in prediction for word in sentence], n))
    wanted = set(_runs([word for sentence in reference for word in sentence], n))
    return len(made & wanted) / len(wanted) if prediction and wanted else 0.0


def _runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

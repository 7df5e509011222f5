"""ROUGE-L as the package `rouge` 1.0.1 computes it, bit for bit, many times faster.

Not the ROUGE-L of `rouge-score`: on the same predictions the two are up to 11 points apart (docs/longbench.md).
Case and punctuation count; a sentence ends at every "." ("3.5", "U.S."); words are counted once. The union of the
longest common subsequences of all sentence pairs, as word sets, over the word sets of both sides. A piece of white
space between two dots is a sentence of one empty word, so that stripping a prediction changes its score.

Speed: rows of the LCS table are bit vectors (Crochemore et al. 2001), of which the trace back reads one bit a step.
Reference: THUDM/LongBench@2e00731, metrics.py rouge_score; rouge 1.0.1, rouge_score.py.
Deviations: none. The package recurses once a step of the trace back, and the official script turns Python's
RecursionError into a score of 0; here the limit is the constant at which that happened, whatever the stack.
"""

from __future__ import annotations

from collections.abc import Sequence

# Nested calls that still worked under `python eval.py` with Python's default limit of 1000.
MAX_TRACE_CALLS = 991


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns F, at most 0.999999995; 0 where the package raises: no sentence on either side, or a trace too deep."""
    return rouge_l(prediction, reference, MAX_TRACE_CALLS)


def rouge_l(prediction: str, reference: str, max_calls: int) -> float:
    """F of rouge-l; `max_calls` is the depth of recursion at which the package would fail, its first call included."""
    words = common_words(prediction, reference, max_calls)
    if words is None:
        return 0.0
    matched, of_reference, of_prediction = words
    recall, precision = matched / of_reference, matched / of_prediction
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def common_words(prediction: str, reference: str, max_calls: int | None = None) -> tuple[int, int, int] | None:
    """Words of the union of the longest common subsequences, of the reference and of the prediction, each counted once.

    None where the package raises: no sentence on either side, or more than `max_calls` nested calls (None: no limit).
    """
    hypotheses, references = sentences(prediction), sentences(reference)
    if not hypotheses or not references:
        return None
    positions = [_positions(hyp) for hyp in hypotheses]
    matched: set[str] = set()
    for ref in references:
        for hyp, places in zip(hypotheses, positions, strict=True):
            words = _traced_words(ref, hyp, places, max_calls or len(ref) + len(hyp) + 1)
            if words is None:
                return None
            matched |= words
    return len(matched), len({word for ref in references for word in ref}), len({w for hyp in hypotheses for w in hyp})


def sentences(text: str) -> list[list[str]]:
    """Words of each sentence, as the package splits a text."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _positions(words: list[str]) -> dict[str, int]:
    """For each word a bit vector of the places where it stands."""
    positions: dict[str, int] = {}
    for place, word in enumerate(words):
        positions[word] = positions.get(word, 0) | (1 << place)
    return positions


def _traced_words(ref: list[str], hyp: list[str], places: dict[str, int], max_calls: int) -> set[str] | None:
    """Words of the one LCS that the package's trace back finds, or None where it would recurse too deep.

    L[i][j] is the LCS length of the first i words of `ref` and j of `hyp`. From the end: equal words are taken;
    unequal ones drop a word of `ref` if L[i-1][j] > L[i][j-1], else one of `hyp`. Of unequal words one of the two
    cells equals L[i][j], so the first holds exactly where L[i][j] > L[i][j-1]. That is bit j-1 of row i being 0.
    """
    i, j = len(ref), len(hyp)
    if places.keys().isdisjoint(ref):  # all cells are 0, and a tie drops a word of hyp
        return set() if j + 1 <= max_calls else None
    full = (1 << j) - 1
    rows = [full]
    for word in ref:
        row = rows[-1]
        match = row & places.get(word, 0)
        rows.append(((row + match) | (row - match)) & full)
    found: set[str] = set()
    calls = 1
    while i and j:
        calls += 1
        if ref[i - 1] == hyp[j - 1]:
            i, j = i - 1, j - 1
            found.add(ref[i])
        elif rows[i] >> (j - 1) & 1:
            j -= 1
        else:
            i -= 1
    return found if calls <= max_calls else None

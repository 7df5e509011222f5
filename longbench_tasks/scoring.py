"""One prediction against its references, as the official eval.py does it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .metrics import Scorer


def first_line(prediction: str) -> str:
    r"""What the official script keeps of an answer to trec, triviaqa, samsum and lsht.

    Only "\n" counts: no other white space is removed, and neither "\r" nor "\u2028" ends a line.
    """
    return prediction.lstrip("\n").split("\n")[0]


def best_score(
    scorer: Scorer, prediction: str, references: Iterable[str], all_classes: Sequence[str] | None, first_line_only: bool
) -> float:
    """The best score over all references, at least 0."""
    if first_line_only:
        prediction = first_line(prediction)
    return max((0.0, *(scorer(prediction, reference, all_classes) for reference in references)))

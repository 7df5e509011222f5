"""How far each document's predictions are from the full cache's, run when it is asked for and kept."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments.scores import Asked, Settings, Value

KL, SAME_TOP = "kl", "same_top"


class Distances(Asked):
    """Sums over each document's tokens; both caches see the same ones, so that what is hard about them is no noise.

    Of a document, [KL in nats, tokens with another likeliest one, tokens, bytes kept]: its text's tokens, those of all
    its choices, or those of the full cache's own answer.
    """

    files_of_answers = "distances.json"
    rolling = True

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        # what the full cache generates is the same for all settings, and is asked for once a search
        self._answers = tempfile.TemporaryDirectory(prefix="kv_lm_eval_tune_")

    def options(self) -> dict[str, Any]:
        return {"use_cache": str(Path(self._answers.name) / "answers")}

    def losses(self, task: str, model_args: Settings, n: int) -> np.ndarray:
        """[n, 2] the loss summed over the tokens of each of the first n texts, and how many these are."""
        which = 0 if self.args.loss == KL else 1
        return self._summed(task, model_args, n)[:, [which, 2]]

    def bytes_of(self, task: str, model_args: Settings, n: int) -> float:
        """Kept, overhead included: the mean over the documents of the first n texts."""
        found = self.of({**model_args, "fidelity": True}, task, [i for text in self.order[task][:n] for i in text])
        return float(np.mean([one[3] for one in found.values()]))

    def _summed(self, task: str, model_args: Settings, n: int) -> np.ndarray:
        texts = self.order[task][:n]
        found = self.of({**model_args, "fidelity": True}, task, [i for text in texts for i in text])
        return np.array([np.sum([found[i] for i in text], axis=0) for text in texts])

    def values(self, results: dict[str, Any], task: str, rows: list[dict[str, Any]]) -> dict[str, Value]:
        stats = results["config"]["kv_stats"]["by_task"][task]
        kept = stats["kv_bytes_prefill_mean"] + (stats["overhead_bytes_mean"] or 0.0)
        return {str(row["doc_id"]): [*_sums(task, row), kept] for row in rows}


def _sums(task: str, row: dict[str, Any]) -> list[float]:
    """KL, tokens with another likeliest one, tokens; of a document's sample."""
    doc = row["doc"] if isinstance(row["doc"], dict) else {}
    parts: Sequence[dict[str, Any]] = row.get("fidelity") or [doc.get("per_token") or {}]
    if any("kl" not in part for part in parts):
        raise UserError(
            f"{task}: a document was answered without the full cache beside the method, so that nothing was compared; "
            "its protocol or its method has no cache to compare"
        )
    kl, same = ([x for part in parts for x in part[name]] for name in ("kl", "same_top"))
    if not kl:
        raise UserError(f"{task}: document {row['doc_id']} has no token to compare")
    return [float(np.sum(kl)), float(len(same) - sum(same)), float(len(kl))]

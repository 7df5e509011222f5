"""FidelityTask: the texts of the perplexity tasks under a method and the full cache in step (`class:` of the YAMLs).

All numbers are over all tokens of all documents together, as llama.cpp's are: a percentile of percentiles would be no
percentile. So what a document hands on is itself, as a number that remembers its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics import perplexity
from kv_lm_eval.metrics.perplexity import NOT_AVAILABLE
from kv_lm_eval.requests.document_scores import DocumentRecord, DocumentScore
from kv_lm_eval.stats import fidelity
from kv_lm_eval.stats.fidelity import Statistics
from kv_lm_eval.tasks.perplexity.task import PerplexityTask


class Measured(float):
    """A number of one document, with the record that it comes from; a plain number in JSON."""

    record: DocumentRecord

    def __new__(cls, value: float, record: DocumentRecord) -> Measured:
        self = super().__new__(cls, value)
        self.record = record
        return self

    def __reduce__(self) -> Any:
        return Measured, (float(self), self.record)


Number = float | None
OF_STATISTICS: dict[str, tuple[Callable[[Statistics], Number], bool | None]] = {  # whether higher is better
    "kl_mean_se": (lambda s: s.kl.error, None),
    "kl_median": (lambda s: s.kl_spread.percentiles[50.0], False),
    "kl_p90": (lambda s: s.kl_spread.percentiles[90.0], False),
    "kl_p95": (lambda s: s.kl_spread.percentiles[95.0], False),
    "kl_p99": (lambda s: s.kl_spread.percentiles[99.0], False),
    "kl_p99_9": (lambda s: s.kl_spread.percentiles[99.9], False),
    "kl_max": (lambda s: s.kl_spread.largest, False),
    "same_top_se": (lambda s: s.same_top.error, None),
    "delta_p_mean": (lambda s: s.delta_p.value, True),
    "delta_p_rms": (lambda s: s.delta_p_rms.value, False),
    "ppl_ratio": (lambda s: s.ppl_ratio.value, False),
    "ppl_ratio_se": (lambda s: s.ppl_ratio.error, None),
    "log_prob_correlation": (lambda s: s.correlation, True),
}
FLOORS = {"kl_noise_floor": "chunking", "kl_noise_floor_bfloat16": "bfloat16"}


def _all_tokens(number: Callable[[Statistics], Number], items: Sequence[Measured]) -> float | str:
    """One of llama.cpp's statistics over the tokens of all documents."""
    found = number(statistics([item.record for item in items]))
    return NOT_AVAILABLE if found is None else found


def _end(which: str, items: Sequence[Measured]) -> float | str:
    """An end of the 95 % interval of the mean KL, over texts or blocks of tokens."""
    found = fidelity.interval([_of(item.record)[0] for item in items])[which]
    return NOT_AVAILABLE if found is None else float(found)


def _floor(kind: str, items: Sequence[Measured]) -> float | str:
    """Measured once a run, so the same for all documents."""
    found = [item.record.noise_floor for item in items]
    known = [floor[kind] for floor in found if floor and kind in floor]
    return max(known) if known else NOT_AVAILABLE


def _of(record: DocumentRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    if record.kl is None or record.base_log_probs is None or record.same_top is None:
        raise UserError(
            "the answer has no numbers against the full cache: it is of a run without them, so give another --use_cache"
        )
    return record.kl, record.base_log_probs, record.log_probs, record.same_top


def statistics(records: Sequence[DocumentRecord]) -> Statistics:
    """Of the tokens of all documents."""
    return fidelity.of_tokens(*(np.concatenate(parts) for parts in zip(*map(_of, records), strict=True)))


class FidelityTask(PerplexityTask):
    """One collection of documents, with the full cache beside the method."""

    aggregations = {
        "kl_mean": (perplexity.ratio, False),
        "kl_low": (partial(_end, "low"), None),
        "kl_high": (partial(_end, "high"), None),
        "kl_before_eviction": (perplexity.ratio, False),
        "kl_after_eviction": (perplexity.ratio, False),
        **{name: (partial(_floor, kind), None) for name, kind in FLOORS.items()},
        "same_top": (perplexity.ratio, True),
        "perplexity": (perplexity.perplexity, False),
        "perplexity_base": (perplexity.perplexity, None),
        **{name: (partial(_all_tokens, number), better) for name, (number, better) in OF_STATISTICS.items()},
        "scored_tokens": (perplexity.total, None),
        "documents": (perplexity.total, None),
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__({**config, "perplexity": {**config["perplexity"], "fidelity": True}})

    def _other_models(self, task: str) -> str:
        return (
            f"{task} compares a compressed cache with the full one of the same model and needs --model kvcompressed: "
            "add method=NAME to its --model_args (method=full gives the noise of the comparison itself)"
        )

    def numbers_of(self, doc: dict[str, Any], score: DocumentScore) -> dict[str, Any]:
        """Sums and counts, and the document itself for what is no quotient of sums."""
        record = score.record
        kl, base, _, same_top = _of(record)
        late = record.after_first_eviction()
        own = statistics([record])
        sums = kl.astype(np.float64)
        return {
            "kl_mean": (float(sums.sum()), len(kl)),
            "kl_before_eviction": (float(sums[~late].sum()), int((~late).sum())),
            "kl_after_eviction": (float(sums[late].sum()), int(late.sum())),
            "same_top": (int(same_top.sum()), len(kl)),
            "perplexity": (float(score), len(kl)),
            "perplexity_base": (float(base.sum(dtype=np.float64)), len(kl)),
            **{name: Measured(own.kl.value, record) for name in ("kl_low", "kl_high", *FLOORS)},
            **{name: Measured(_or_nan(number(own)), record) for name, (number, _) in OF_STATISTICS.items()},
            "scored_tokens": len(kl),
            "documents": 1,
        }


def _or_nan(number: Number) -> float:
    return float("nan") if number is None else number

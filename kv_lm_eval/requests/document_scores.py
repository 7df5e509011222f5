"""What a scored document is remembered by: every token's log-probability, and the number that lm-eval takes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class DocumentRecord:
    """One scored document of n tokens, those that stand before the text not among them.

    Attributes:
        reading: as asked, with the defaults filled in. model, settings: what scored it.
        tokens: [n] int32 ids. log_probs: [n] float32 nats, NaN where a token was not scored. greedy: [n] bool.
        slots: [n] int32, pairs per KV head that were visible when the token was predicted; None for windows.
        evictions: (tokens fed, slots dropped) of each cut; the prefix token counts as fed.
        start, end: the tokens stand for text[start:end]; the whole text where nothing was left off.
        kl, base_log_probs, same_top: [n] against the full cache (metrics/divergence.py); None where it did not run too.
        noise_floor: mean KL of the full cache against itself, by what differs; None likewise.
        view: of a document that is shown, `likeliest.view`.
    """

    reading: dict[str, Any]
    model: str
    settings: dict[str, Any]
    tokens: np.ndarray
    log_probs: np.ndarray
    greedy: np.ndarray
    slots: np.ndarray | None = None
    evictions: list[tuple[int, int]] = field(default_factory=list)
    end: int = 0
    start: int = 0
    kl: np.ndarray | None = None
    base_log_probs: np.ndarray | None = None
    same_top: np.ndarray | None = None
    noise_floor: dict[str, float] | None = None
    view: dict[str, Any] | None = None

    @property
    def scored(self) -> np.ndarray:
        """[n] bool."""
        return np.isfinite(self.log_probs)

    def after_first_eviction(self) -> np.ndarray:
        """[n] bool: tokens predicted by a query that came after the first cut."""
        first = self.evictions[0][0] if self.evictions else len(self.tokens)
        return np.arange(len(self.tokens)) >= first

    def per_token(self) -> dict[str, Any]:
        """For JSON: what comparing two runs token by token takes."""
        log_probs = np.where(self.scored, self.log_probs, np.nan)
        return {
            "reading": self.reading,
            "model": self.model,
            "settings": self.settings,
            "tokens": self.tokens.tolist(),
            "nll": [None if x != x else round(-x, 6) for x in log_probs.tolist()],
            "first_eviction": self.evictions[0][0] if self.evictions else None,  # tokens fed before it
            "cuts": len(self.evictions),
            **self._beside(),
        }

    def _beside(self) -> dict[str, Any]:
        if self.kl is None or self.base_log_probs is None or self.same_top is None:
            return {}
        return {
            "kl": [float(f"{x:.4g}") for x in self.kl.tolist()],
            "base_nll": [round(-x, 6) for x in self.base_log_probs.tolist()],
            "same_top": self.same_top.tolist(),
            "noise_floor": self.noise_floor,
            **({"view": self.view} if self.view else {}),
        }


class DocumentScore(float):
    """Log-likelihood of a document in nats, with its record; pickles (--use_cache), and is a number in JSON.

    `efficiency` is what its sample says of the request (`samples.py`).
    """

    record: DocumentRecord
    efficiency: dict[str, Any] | None

    def __new__(cls, record: DocumentRecord, efficiency: dict[str, Any] | None = None) -> DocumentScore:
        self = super().__new__(cls, float(np.nansum(record.log_probs, dtype=np.float64)))
        self.record, self.efficiency = record, efficiency
        return self

    def __reduce__(self) -> Any:
        return DocumentScore, (self.record, self.efficiency)

    def bare(self) -> DocumentScore:
        """Without what belongs to one run."""
        return DocumentScore(self.record)

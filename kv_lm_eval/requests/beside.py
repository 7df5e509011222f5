"""What the full cache says to one request, and how far a method's predictions are from it: fidelity=True."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_lm_eval.metrics.divergence import NUMBERS, Divergence

Base = str | tuple[float, bool]


@dataclass(frozen=True)
class Beside:
    """The full cache's answer and both caches' numbers per token.

    Attributes:
        base: its answer: a text, or a continuation's log-likelihood and whether greedy decoding would give it.
        along_base: along its own answer, or along the continuation. along_own: along the method's answer; None for
            continuations.
        tokens, base_tokens: [n] ids of both answers, their stops included; None for continuations.
        noise_floor: mean KL of the full cache against itself, by what differs.
        evidence: (start, stop, share kept) of each stretch of the full cache's answer, by its tokens, that repeats what
            the prompt says, with how much of the latter's pairs the method's cache held when it began to answer.
        view: of a sample that is shown, `likeliest.view` along the full cache's answer.
    """

    base: Base
    along_base: Divergence
    along_own: Divergence | None = None
    tokens: np.ndarray | None = None
    base_tokens: np.ndarray | None = None
    noise_floor: dict[str, float] | None = None
    evidence: Sequence[tuple[int, int, float]] = ()
    view: dict[str, Any] | None = None

    @property
    def identical(self) -> bool:
        """Whether both answers have the same tokens."""
        return self.first_divergence is None

    @property
    def first_divergence(self) -> int | None:
        """Tokens that both answers begin with in common; None: all of both."""
        if self.tokens is None or self.base_tokens is None:
            return None
        n = min(len(self.tokens), len(self.base_tokens))
        apart = np.flatnonzero(self.tokens[:n] != self.base_tokens[:n])
        if len(apart):
            return int(apart[0])
        return None if len(self.tokens) == len(self.base_tokens) else n

    def parts(self) -> dict[str, Any]:
        """Flat, of plain values and arrays: to be written down."""
        out = {
            name: getattr(self, name) for name in ("base", "tokens", "base_tokens", "noise_floor", "evidence", "view")
        }
        for name in ("along_base", "along_own"):
            if (found := getattr(self, name)) is not None:
                out |= {f"{name}.{of}": getattr(found, of) for of in NUMBERS}
        return out

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> Beside:
        """What `parts` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        along = {
            name: Divergence(*(parts[f"{name}.{of}"] for of in NUMBERS))
            for name in ("along_base", "along_own")
            if f"{name}.kl" in parts
        }
        if any(len(getattr(one, of)) != len(one) for one in along.values() for of in NUMBERS):
            raise ValueError("arrays of several lengths")
        base = parts["base"]
        return cls(
            base=base if isinstance(base, str) else (float(base[0]), bool(base[1])),
            tokens=parts["tokens"],
            base_tokens=parts["base_tokens"],
            noise_floor=parts["noise_floor"],
            evidence=[(int(a), int(b), float(kept)) for a, b, kept in parts.get("evidence") or ()],
            view=parts.get("view"),
            **along,
        )

    def of_sample(self) -> dict[str, Any]:
        """For JSON, in a sample: what a reader looks at token by token."""
        out: dict[str, Any] = {"base": self.base, **_per_token("", self.along_base)}
        if self.along_own is not None and self.tokens is not None and self.base_tokens is not None:
            out |= {
                **_per_token("own_", self.along_own),
                "first_divergence": self.first_divergence,
                "tokens": self.tokens.tolist(),
                "base_tokens": self.base_tokens.tolist(),
                **({"evidence": [list(one) for one in self.evidence]} if self.evidence else {}),
                **({"view": self.view} if self.view else {}),
            }
        return out


def _per_token(prefix: str, found: Divergence) -> dict[str, Any]:
    return {
        f"{prefix}kl": [float(f"{x:.4g}") for x in found.kl.tolist()],
        f"{prefix}nll": [round(-x, 6) for x in found.log_probs.tolist()],
        f"{prefix}base_nll": [round(-x, 6) for x in found.base_log_probs.tolist()],
        f"{prefix}same_top": found.same_top.tolist(),
    }

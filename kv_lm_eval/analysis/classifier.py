"""Sorts attention heads into positional, mixed, gathering and dead by a few thresholds, the first rule that fits wins.

The rules are those of cny123222/LLM-Efficient-Reasoning@95e336b (attention_analyzer.py), with its numbers as defaults.
They have quirks that a reader should know: "dead" is a head whose attention is nearly uniform, which may well work
(averaging over everything is a use); entropies grow with the length of the text, so thresholds fit one chunk length;
a head that looks at the sinks is "positional". Later versions of the original moved the thresholds and split
"positional" in three, so they are written into every profile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kv_lm_eval.analysis.head_statistics import HeadStatistics
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.head_profile import Head


def _threshold(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Thresholds:
    """Where one type ends and the next begins, and the windows that each recommends."""

    dead_uniformity: float = _threshold(0.1, "dead: KL divergence from uniform attention below this, nats")
    low_entropy: float = _threshold(1.5, "positional: entropy below this, nats, and one of the next two")
    high_local: float = _threshold(0.6, "positional: attention to the last 9 tokens over this")
    high_sink: float = _threshold(0.3, "positional: attention to the first 4 tokens over this")
    high_entropy: float = _threshold(3.0, "gathering: entropy over this, nats")
    sure_entropy: float = _threshold(2.0, "gathering: nats over high_entropy at which the confidence is 1")
    near_mass: float = _threshold(0.8, "positional: the window holds this share of the attention")
    mixed_window: int = _threshold(64, "window recommended for mixed heads, tokens")

    def __post_init__(self) -> None:
        if self.low_entropy > self.high_entropy:
            raise UserError(
                f"low_entropy={self.low_entropy:g} is over high_entropy={self.high_entropy:g}: a head between them "
                "would be positional and gathering at once"
            )
        if min(self.dead_uniformity, self.low_entropy, self.high_local, self.sure_entropy) <= 0:
            raise UserError("dead_uniformity, low_entropy, high_local and sure_entropy must be over 0")
        if self.mixed_window < 1 and self.mixed_window != -1:
            raise UserError(f"mixed_window={self.mixed_window} must be at least 1, or -1 for all tokens")


def classify(head: HeadStatistics, limits: Thresholds) -> Head:
    """The type of one head, how sure it is (0 to 1), and the window that it should need."""
    if head.uniformity < limits.dead_uniformity:
        return Head("dead", 1 - max(head.uniformity, 0.0) / limits.dead_uniformity, 1)
    if head.entropy < limits.low_entropy:
        if head.local > limits.high_local:
            sure = (1 - head.entropy / limits.low_entropy) * head.local / limits.high_local
            return Head("positional", min(1.0, sure), _near_window(head.distances, limits.near_mass))
        if head.sink > limits.high_sink:
            return Head("positional", min(1.0, head.sink), 8)
    elif head.entropy > limits.high_entropy:
        return Head("gathering", min(1.0, (head.entropy - limits.high_entropy) / limits.sure_entropy), -1)
    return Head("mixed", 0.5, limits.mixed_window)


def _near_window(distances: list[float], mass: float) -> int:
    """Four more than the first distance within which so much of the attention lies, 8 to 19; 16 where none does."""
    total = 0.0
    for distance, share in enumerate(distances[:16]):
        total += share
        if total > mass:
            return max(8, distance + 4)
    return 16

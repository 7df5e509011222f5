"""The official truncation: too long a prompt loses its middle, as text, before any chat template.

Reference: THUDM/LongBench@2e00731, pred.py lines 56 to 62. Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fitted:
    """A prompt and what became of it. Tokens are those of the untemplated text, special ones included."""

    text: str
    truncated: bool
    tokens_before: int
    tokens_after: int


def truncate_middle(prompt: str, tokenizer: Any, max_length: int) -> Fitted:
    """Keeps the first and the last half of `max_length` tokens, decoded without special tokens and joined as text.

    The halves are decoded apart, so a character may be lost at the seam, and the text that comes out need not be
    `max_length` tokens again: `tokens_after` is counted anew.
    """
    ids = encode(prompt, tokenizer)
    if len(ids) <= max_length:
        return Fitted(prompt, False, len(ids), len(ids))
    half = int(max_length / 2)
    text = tokenizer.decode(ids[:half], skip_special_tokens=True) + tokenizer.decode(
        ids[-half:], skip_special_tokens=True
    )
    return Fitted(text, True, len(ids), len(encode(text, tokenizer)))


def encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids, special tokens included, without the warning about long texts."""
    return list(tokenizer(text, truncation=False, verbose=False).input_ids)

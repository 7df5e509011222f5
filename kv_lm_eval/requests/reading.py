"""How a document is read: under which protocol, and as which tokens.

Under a protocol of ours the prefix token stands before a document once, whatever the tokenizer adds by itself. Only
lm-eval's own reading, which `full` shares with `hf`, puts it before a tokenizer's own BOS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lm_eval.models.huggingface import HFLM

from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.requests.rows import text_tokens

PROTOCOLS = {
    "streaming": "one cache across the document, cut by the schedule from the first token on",
    "prefill_then_stream": "the first prefill_tokens in one forward and a cut after it, then as streaming",
    "strided": "windows of strided_length tokens, stride apart, each a forward of its own; new tokens are scored",
    "rolling": "lm-eval's disjoint windows of the model's maximum length",
}
CARRIED = ("streaming", "prefill_then_stream")  # one cache goes through the document, so that compression can act
LONGEST_CHARACTER = 8  # tokens that one character may take, and more than any tokenizer needs


@dataclass(frozen=True)
class Reading:
    """How a document is read.

    Args:
        protocol: a name of PROTOCOLS.
        max_eval_tokens: only the first so many tokens of each document; None: all.
        prefill_tokens: prefill_then_stream: tokens of the first forward, prefix included; None: the method's budget.
        strided_length, stride: strided: tokens of a window (None: the model's maximum) and from one to the next
            (None: half a window).
        fidelity: whether the full cache runs beside it; None: as the model's settings say.
    """

    protocol: str = "streaming"
    max_eval_tokens: int | None = None
    prefill_tokens: int | None = None
    strided_length: int | None = None
    stride: int | None = None
    fidelity: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.protocol, str) or self.protocol not in PROTOCOLS:
            known = "; ".join(f"{name}: {what}" for name, what in PROTOCOLS.items())
            raise UserError(
                f"protocol={self.protocol!r}{close_names(str(self.protocol), PROTOCOLS)}; there are {known}"
            )
        for name, least in (("max_eval_tokens", 2), ("prefill_tokens", 1), ("strided_length", 2), ("stride", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UserError(f"{name}={value!r} must be a whole number of tokens, at least {least}, or null")
        needs = {"prefill_tokens": "prefill_then_stream", "strided_length": "strided", "stride": "strided"}
        for name, protocol in needs.items():
            if getattr(self, name) is not None and self.protocol != protocol:
                raise UserError(f"{name}={getattr(self, name)} has no effect: it is for protocol={protocol}")
        if self.fidelity and self.protocol not in CARRIED:
            raise UserError(
                f"protocol={self.protocol} reads each window in one forward, in which no cache is cut: there would be "
                f"nothing to compare with the full cache; use protocol={' or '.join(CARRIED)}"
            )
        if self.stride and self.strided_length and self.stride > self.strided_length:
            raise UserError(
                f"stride={self.stride} is longer than strided_length={self.strided_length}: the tokens between two "
                "windows would never be scored"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Reading:
        """From a request's second argument."""
        return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})

    def options(self) -> dict[str, Any]:
        """The request's second argument: what is not None, so that --use_cache tells readings apart."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


@dataclass(frozen=True)
class Document:
    """A text as tokens.

    Attributes:
        head: tokens before the text, not scored; the prefix, but for windows that start with the text itself.
        tokens: to be scored; they stand for text[start:end].
    """

    head: tuple[int, ...]
    tokens: list[int]
    start: int
    end: int


def as_lm_eval(lm: HFLM, text: str, reading: Reading) -> Document:
    """What lm-eval's hf model reads: the prefix, and then the tokenizer's own BOS where it adds one."""
    tokens = lm.tok_encode(text)
    kept, end = first(lm, text, tokens, reading.max_eval_tokens, own_special=True)
    return Document((lm.prefix_token_id,), kept, 0, end)


def as_ours(lm: HFLM, text: str, reading: Reading) -> Document:
    """The prefix once; strided windows start with what the tokenizer puts before a text, as in their recipe."""
    if reading.protocol != "strided":
        tokens, start = text_tokens(lm.tokenizer, text, lm.prefix_token_id)
        kept, end = first(lm, text[start:], tokens, reading.max_eval_tokens, own_special=False)
        return Document((lm.prefix_token_id,), kept, start, start + end)
    tokens = lm.tok_encode(text, add_special_tokens=False)
    whole = lm.tok_encode(text)
    before = next((k for k in range(len(whole) - len(tokens) + 1) if whole[k : k + len(tokens)] == tokens), 0)
    kept, end = first(lm, text, tokens, reading.max_eval_tokens, own_special=False)
    return Document(tuple(whole[:before]), kept, 0, end)


def first(lm: HFLM, text: str, tokens: list[int], most: int | None, own_special: bool) -> tuple[list[int], int]:
    """At most `most` of a text's tokens, and how many of its characters they stand for.

    A cut never falls inside a character that takes several tokens: it moves back to where that begins.

    Args:
        own_special: whether the tokenizer's special tokens are among them.
    """
    if most is None or len(tokens) <= most:
        return tokens, len(text)
    for keep in range(most, max(0, most - LONGEST_CHARACTER), -1):
        decoded = lm.tokenizer.decode(
            tokens[:keep], skip_special_tokens=own_special, clean_up_tokenization_spaces=False
        )
        if text.startswith(decoded):
            return tokens[:keep], len(decoded)
    return _by_offsets(lm, text, tokens, most)


def _by_offsets(lm: HFLM, text: str, tokens: list[int], most: int) -> tuple[list[int], int]:
    """The same for tokenizers whose decoding does not give the text back, as where they change its spaces."""
    for special in (True, False) if lm.tokenizer.is_fast else ():
        encoding = lm.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if encoding["input_ids"] == tokens:
            spans, keep = encoding["offset_mapping"], most
            while keep > 0 and spans[keep] != (0, 0) and spans[keep][0] < spans[keep - 1][1]:
                keep -= 1
            return tokens[:keep], max(end for _, end in spans[:keep])
    raise UserError(
        f"max_eval_tokens={most}: this model's tokenizer does not say which text {most} tokens stand for, so that "
        "words and bytes could not be counted. Use a fast tokenizer, or give a shorter text and no limit"
    )

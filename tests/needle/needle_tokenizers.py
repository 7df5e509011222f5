"""The tokenizers that the haystacks are tried with: kv-tiny's, and two real ones where a folder of data holds them."""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from kv_lm_eval import tiny

DATA = Path(os.environ.get("KV_LM_EVAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
NAMES = ("kv-tiny", "gpt-neox", "llama-2")


def data(*parts: str) -> Path:
    """A file of the real data, or the test is skipped."""
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data is not here: {path} (set KV_LM_EVAL_DATA to the folder that has it)")
    return path


@functools.cache
def load(name: str) -> Any:
    if name == "kv-tiny":
        return AutoTokenizer.from_pretrained(tiny.path())
    if name == "gpt-neox":
        return PreTrainedTokenizerFast(tokenizer_file=str(data("tokenizers", "gpt_neox_20B_tokenizer.json")))
    pieces = list(_pieces(data("tokenizers", "llama2_tokenizer.model").read_bytes()))
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = [
        (piece[:k], piece[k:], score)
        for piece, score in pieces
        for k in range(1, len(piece))
        if piece[:k] in vocab and piece[k:] in vocab
    ]
    merges.sort(key=lambda m: -m[2])  # the sort is stable: among equals, vocabulary order
    return LlamaTokenizer(vocab=vocab, merges=[(a, b) for a, b, _ in merges])


def _pieces(model: bytes) -> Iterator[tuple[str, float]]:
    """(piece, score) of a sentencepiece model: field 1 of the message, whose fields 1 and 2 they are."""
    for number, value in _fields(model):
        if number == 1:
            piece = dict(_fields(value))
            yield piece[1].decode(), struct.unpack("<f", piece[2])[0]


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Protocol buffer fields as (number, raw value); of varints only the place is kept."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            _, at = _varint(message, at)
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:
            size, at = _varint(message, at)
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at

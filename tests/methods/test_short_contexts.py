"""Contexts of one, two or three tokens beside a long one, whatever the tail: every method with every treatment gives
finite answers, and each row its own (float64)."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch

from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import base, evicted
from kv_lm_eval.methods.compression import Compression

LENGTHS = (1, 40, 2, 3)
TAILS = (0, 1, 2, 3, 50)
BITS = {"nbits": 4, "residual_length": 4, "group_size": 4}
TREATMENTS = [{"evicted": name} for name in evicted.available()] + [
    {"evicted": "compensate", "weight": "uniform", "count_bias": "log_n", "key_space": "pre_rope", "block_size": 3},
    {"head_budget": "ada", "alpha": 0},
    {"layer_budget": "pyramid"},
    BITS,
]
METHODS = tiny.methods(lambda cls: cls.uses_cache)


@functools.cache
def pair() -> tiny.Pair:
    first = tiny.pair("llama")
    model = tiny.build("llama").double()
    return tiny.Pair(model, first.stock, tiny.wrap(model, tiny.compression(method="streaming_llm", window_size=8)))


def compositions(method: str) -> list[Compression]:
    """The method with its own schedule and with a cut every two tokens, and with every treatment that it takes."""
    own = tiny.free(method, 12, **(BITS if "nbits" in base.load(method).presets else {}))
    out = []
    for more in ({}, {"compress_every": 2}, *({"compress_every": 2, **t} for t in TREATMENTS)):
        try:
            out.append(tiny.compression(**{**own, **more}))
        except UserError as error:
            refused = str(error)
    assert out, refused
    return out


def generated(compression: Compression, rows: list[list[int]]) -> torch.Tensor:
    """Last logits of the prefill and of four steps, [steps, rows, V]."""
    cache, out = make_cache(compression, pair().facts), []
    for step in range(5):
        fed = rows if step == 0 else [[5 + step]] * len(rows)
        starts = None if step == 0 else [len(r) + step - 1 for r in rows]
        out.append(tiny.forward(pair().model, cache, fed, starts=starts)[:, -1])
    return torch.stack(out)


@pytest.mark.parametrize("method", METHODS)
def test_short_contexts_beside_long_ones_are_finite_and_their_own(method: str) -> None:
    rows = [tiny.tokens(n, seed=n) for n in LENGTHS]
    choices = [[[7, 8, 9], [11]]] * len(rows)
    for compression in compositions(method):

        def cache(compression: Compression = compression) -> object:
            return make_cache(compression, pair().facts)

        def close(
            a: torch.Tensor,
            b: torch.Tensor,
            what: str,
            compression: Compression = compression,
        ) -> None:
            assert a.isfinite().all() and b.isfinite().all(), (what, compression)
            assert (a - b).abs().max() < 1e-9, (what, compression)

        together = generated(compression, rows)
        for b, row in enumerate(rows):
            close(together[:, b], generated(compression, [row])[:, 0], f"generate, {len(row)} tokens")
        for tail in TAILS:
            together = score_continuations(pair().model, cache, rows, choices, tail)[0]
            for b, row in enumerate(rows):
                alone = score_continuations(pair().model, cache, [row], choices[:1], tail)[0][0]
                scores = (torch.tensor([score for score, _ in group]) for group in (together[b], alone))
                close(*scores, what=f"tail {tail}, {len(row)} tokens")
        streamed = score_documents(pair().model, cache, rows, Stream(0, 2))[0]
        for document, row in zip(streamed, rows, strict=True):
            alone = score_documents(pair().model, cache, [row], Stream(0, 2))[0][0]
            close(document.log_probs, alone.log_probs, f"document of {len(row)} tokens")

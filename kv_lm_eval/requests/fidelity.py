"""What fidelity=True adds to the way requests are run: the full cache beside the method, and the noise of comparing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine import fidelity
from kv_lm_eval.engine.streaming import ScoredDocument, score_documents
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics.divergence import Divergence
from kv_lm_eval.requests.run import Run

FLOOR_TOKENS, LEAST_FLOOR_TOKENS = 1024, 96  # over which the noise is measured: a twentieth of the text, within these


def check_lengths(run: Run, lengths: Sequence[int]) -> None:
    """Refuses texts that cannot run under two caches in step."""
    if over := [n for n in lengths if run.alone(n)]:
        assert run.facts is not None
        raise UserError(
            f"fidelity with a text of {max(over)} tokens: beyond {run.facts.border} tokens this model rotates every "
            "token by the length of the whole sequence, so that two caches cannot run in step; take shorter texts "
            "(max_eval_tokens, for documents)"
        )


def score(compared: bool, *args: Any) -> tuple[list[ScoredDocument], CompressedCache, Sequence[Divergence | None]]:
    """`score_documents`, with the full cache beside it or alone."""
    if compared:
        return fidelity.score_beside(*args)
    scored, cache = score_documents(*args)
    return scored, cache, [None] * len(scored)


def fields_of(found: Divergence | None) -> dict[str, Any]:
    """A document record's fields of the comparison."""
    if found is None:
        return {}
    return {"kl": found.kl, "base_log_probs": found.base_log_probs, "same_top": found.same_top}


def noise_floor(run: Run, documents: Sequence[list[int]]) -> dict[str, float]:
    """Mean KL of the full cache against itself, over the beginning of the longest document, by what differs.

    "chunking": forwards of other lengths; "bfloat16": that and, for a model in full precision, its matrix products.
    """
    assert run.facts is not None
    total = sum(map(len, documents))
    tokens = max(documents, key=len)[: min(FLOOR_TOKENS, max(LEAST_FLOOR_TOKENS, total // 20))]
    kinds: dict[str, torch.dtype | None] = {"chunking": None}
    if run.lm.model.dtype in (torch.float32, torch.float64) and run.lm.mixed_precision_dtype is None:
        kinds["bfloat16"] = torch.bfloat16
    found: dict[str, float] = {}
    for kind, dtype in kinds.items() if tokens else ():
        with run.autocast():
            one = fidelity.noise_floor(run.lm.model, run.facts, run.lm.prefix_token_id, tokens, dtype)
        found[kind] = float(one.kl.mean(dtype=np.float64))
    return found

"""What a method needs of a loaded model: its facts, new caches, and the compiled step where that is asked for."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.again import words_of
from kv_lm_eval.engine.check import Roads, wrap
from kv_lm_eval.engine.compiled import Decoder
from kv_lm_eval.engine.lent import as_found
from kv_lm_eval.engine.prefill import NewCache
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.settings import EngineSettings


class Served(NamedTuple):
    """None of it where the method has no cache; no decoder without compile=True."""

    facts: ModelFacts | None = None
    new_cache: NewCache | None = None
    decoder: Decoder | None = None


def served(
    model: PreTrainedModel,
    tokenizer: Any,
    compression: Compression,
    engine: EngineSettings,
    autocast: torch.dtype | None = None,
) -> Served:
    """What the method needs of the model, which will run in the format `autocast`, None: its own.

    Raises:
        UserError: the self-check refuses the model; it is left as it was.
    """
    if not compression.method.uses_cache:
        return Served()
    evict = engine.prefill_evict
    chunk = evict or engine.prefill_chunk
    with as_found(model):
        facts = wrap(model, compression, Roads(chunk is not None, not engine.question_in_prompt, engine.compile))
        if compression.method.reads_again and tokenizer is not None:  # a template may refuse to be asked
            facts.words = words_of(tokenizer)
    new_cache = partial(make_cache, compression, facts, chunk, evict is not None)
    return Served(facts, new_cache, Decoder(model, autocast=autocast) if engine.compile else None)

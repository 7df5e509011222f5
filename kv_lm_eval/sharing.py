"""Several LM objects of one loaded model: what one of them is asked, it answers for the others on its way.

full = KVCompressedLM("kv-tiny", method="full")
half = under(full, "kv-tiny", method="snapkv", keep_ratio=0.5)
with answered_by(full, half, "answers", CompressionLog()):
    ...  # full is evaluated
...  # half is evaluated, with use_cache="answers"
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.api.model import CacheHook, CachingLM

from kv_lm_eval.metrics.compression import CompressionLog
from kv_lm_eval.model import KVCompressedLM


def under(lm: KVCompressedLM, pretrained: Any, **kwargs: Any) -> KVCompressedLM:
    """The same loaded model under other settings of ours; what it shares with the first does not change.

    Args:
        pretrained, **kwargs: as of the constructor, the same but for the method, its settings and the engine's.

    Raises:
        ValueError: another model, or other arguments of lm-eval's hf model.
        UserError: as the constructor.
    """
    other = copy.copy(lm)
    other.settle(pretrained, kwargs)
    if other.arguments != lm.arguments:
        raise ValueError("another model, or loaded otherwise")
    other.take_up()
    return other


@contextmanager
def answered_by(asked: KVCompressedLM, other: KVCompressedLM, answers: str, log: CompressionLog) -> Iterator[None]:
    """Inside, what the first LM object is asked is answered for the other one too, where that is possible; the other
    one's own run finds the answers, with their numbers, with --use_cache.

    Args:
        answers: what the own run will be given as `use_cache`. log: of the own run, whose records begin here.
    """
    other.compression_log, other.made.noting = log, True
    kept = CachingLM(other, f"{answers}_rank{other.rank}.db")
    asked.beside.append(other)
    try:
        yield
    finally:
        asked.beside.remove(other)
        kept.dbdict.close()
        other.made.noting = False
        other.set_cache_hook(CacheHook(None))

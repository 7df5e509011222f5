"""Log-likelihood of whole documents with one cache carried from the first token to the last.

A document of any length is fed in segments that end where the schedule cuts, which gives the same numbers as feeding
it token by token, for every method; no window starts afresh with a context of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.prefill import HOLD_TOKENS, NewCache, feed
from kv_lm_eval.methods.schedule import Schedule

LOGIT_ELEMENTS = 2**27  # logits held at a time


@torch.inference_mode()
def score_documents(
    model: PreTrainedModel,
    new_cache: NewCache,
    prefix_token: int,
    documents: Sequence[Sequence[int]],
    every: int,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[torch.Tensor], CompressedCache]:
    """Log-probability of every token of a batch of documents, each predicted from all that the cache still holds.

    Args:
        prefix_token: fed before each document, so that its first token is scored too.
        documents: token rows. every: tokens between two cuts, counted from the first token fed.
        progress: called with the number of tokens scored by each step.

    Returns:
        per document a float32 tensor of log-probabilities in nats, one a token; and the cache (for its numbers).
    """
    cache = new_cache()
    cache.more_cuts = True
    rows = [[prefix_token, *d] for d in documents]
    parts: list[list[torch.Tensor]] = [[] for _ in rows]
    longest = max(map(len, rows)) - 1
    schedule = Schedule(every)
    vocab = model.config.get_text_config().vocab_size
    most = max(64, min(HOLD_TOKENS, LOGIT_ELEMENTS // (len(rows) * vocab)))
    done, first_cut = 0, _first_cut(cache, every, longest)
    while done < longest:
        until_cut = first_cut - done if done < first_cut else schedule.until_due(done)
        step = min(longest - done, until_cut, most)
        segment = [r[done : min(done + step, len(r) - 1)] for r in rows]
        cache.mode = "cut" if step == until_cut else "hold"
        logits = feed(model, cache, segment, side="right", logits=0)
        log_probs = F.log_softmax(logits, dim=-1, dtype=dtype)
        for b, s in enumerate(segment):
            if s:
                targets = torch.tensor(rows[b][done + 1 : done + 1 + len(s)], device=logits.device)
                parts[b].append(log_probs[b, : len(s)].gather(1, targets[:, None]).squeeze(1).float())
        done += step
        progress(sum(map(len, segment)))
    return [torch.cat(p) if p else torch.zeros(0) for p in parts], cache


def _first_cut(cache: CompressedCache, every: int, longest: int) -> int:
    """The first multiple of `every` at which a row would lose anything: until then cuts change
    nothing and are skipped."""
    if not cache.compression.method.compresses:
        return longest
    at = every
    while at < longest and not cache.compression.evicts(at, len(cache.stores)):
        at += every
    return at

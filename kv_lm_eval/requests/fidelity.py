"""What fidelity=True adds to the way requests are run: the full cache beside the method, and the noise of comparing.

Documents and continuations run under both caches. Of an answer that is generated there are two: the full cache's own,
which does not depend on the method and is asked for once a prompt, and the method's; both caches then go along both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine import fidelity
from kv_lm_eval.engine.choices import How, Score, score_continuations
from kv_lm_eval.engine.fidelity import Compared
from kv_lm_eval.engine.prefill import NewCache
from kv_lm_eval.engine.question import Tails
from kv_lm_eval.engine.streaming import ScoredDocument, score_documents
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics.compression import CompressionLog
from kv_lm_eval.metrics.divergence import Divergence
from kv_lm_eval.requests import evidence, likeliest
from kv_lm_eval.requests.beside import Beside
from kv_lm_eval.requests.prompt import Prompt
from kv_lm_eval.requests.run import Run
from kv_lm_eval.requests.samples import Text

FLOOR_TOKENS, LEAST_FLOOR_TOKENS = 1024, 96  # over which the noise is measured: a fortieth of the text, within these


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
    """`score_documents`, with the full cache beside it or alone; the last argument is which documents are shown."""
    if compared:
        return fidelity.score_beside(*args)
    scored, cache = score_documents(*args[:-1])
    return scored, cache, [None] * len(scored)


def fields_of(found: Divergence | None, tokens: Sequence[int], run: Run) -> dict[str, Any]:
    """A document record's fields of the comparison."""
    if found is None:
        return {}
    shown = likeliest.view(found, tokens, (), run.lm.tokenizer.decode)
    return {"view": shown, "kl": found.kl, "base_log_probs": found.base_log_probs, "same_top": found.same_top}


def score_choices(
    run: Run,
    floor: dict[str, float] | None,
    new_cache: NewCache,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    tails: int | Sequence[int] | Tails,
) -> tuple[list[list[Score]], CompressedCache, list[list[Beside]] | None]:
    """`score_continuations`, with the full cache beside it or, where there is no noise floor, alone."""
    model, dtype = run.lm.model, run.lm.softmax_dtype
    if floor is None:
        return *score_continuations(model, new_cache, contexts, continuations, tails, How(dtype)), None
    scores, cache, base, found = fidelity.continue_beside(
        model, new_cache, contexts, continuations, tails, Compared(dtype)
    )
    beside = [
        [Beside(one, along, noise_floor=floor) for one, along in zip(*group, strict=True)]
        for group in zip(base, found, strict=True)
    ]
    return scores, cache, beside


def compared_answers(
    run: Run,
    floor: dict[str, float],
    prompts: Sequence[Prompt],
    answers: Sequence[Text],
    generate: Callable[[Run, Sequence[Prompt]], list[Text]],
) -> list[Text]:
    """Answers of a batch with what the full cache says to each prompt.

    Args:
        generate: the answers of prompts under a run's cache.
    """
    base = _answers_of_full(run, prompts, generate)
    ways = [
        [list(one.tokens)] if one.tokens == b.tokens else [list(b.tokens), list(one.tokens)]
        for one, b in zip(answers, base, strict=True)
    ]
    tails: int | list[int] = [p.tail for p in prompts] if run.question_first else 0
    assert run.new_cache is not None
    shown = likeliest.first_of_tasks(run)
    _, cache, _, found = fidelity.continue_beside(
        run.lm.model,
        run.new_cache,
        [p.ids for p in prompts],
        ways,
        tails,
        Compared(run.lm.softmax_dtype, {(row, 0) for row, p in enumerate(prompts) if p.i in shown}),
    )
    repeated = [
        [(x.start, x.stop, fidelity.share_kept(cache, row, x.places)) for x in _evidence(run, p, b)]
        for row, (p, b) in enumerate(zip(prompts, base, strict=True))
    ]
    return [
        Text(
            one,
            one.efficiency,
            Beside(
                base=str(b),
                along_base=along[0],
                along_own=along[-1],
                tokens=np.array(one.tokens, dtype=np.int32),
                base_tokens=np.array(b.tokens, dtype=np.int32),
                noise_floor=floor,
                evidence=facts,
                view=likeliest.view(along[0], b.tokens, p.ids, run.lm.tokenizer.decode),
            ),
            one.tokens,
        )
        for p, one, b, along, facts in zip(prompts, answers, base, found, repeated, strict=True)
    ]


def _evidence(run: Run, prompt: Prompt, base: Text) -> list[evidence.Piece]:
    """What the full cache's answer repeats of its prompt."""
    text = run.requests[prompt.i].args[0]
    return evidence.pieces(
        text, run.doc(prompt.i), len(prompt.ids), lru_cache(run.tokens_from), base.tokens, run.lm.tokenizer.decode
    )


def _answers_of_full(
    run: Run, prompts: Sequence[Prompt], generate: Callable[[Run, Sequence[Prompt]], list[Text]]
) -> list[Text]:
    """The full cache's own greedy answers, each asked for once a model and prompt."""
    assert run.facts is not None and run.answers_of_full is not None
    keys = [run.answers_of_full.key(p.ids, p.settings.key) for p in prompts]
    known = [run.answers_of_full.get(key) for key in keys]
    todo = [b for b, found in enumerate(known) if found is None]
    if todo:
        full = replace(
            run,
            compression=fidelity.FULL,
            new_cache=fidelity.full_cache(run.facts),
            decoder=None,
            log=CompressionLog(),
            own_keys=None,
            engine=replace(run.engine, fidelity=False),
        )
        for b, made in zip(todo, generate(full, [replace(prompts[b], boundary=None) for b in todo]), strict=True):
            known[b] = made
            run.answers_of_full.put(keys[b], made)
    return [found for found in known if found is not None]


def floor_of(run: Run, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> dict[str, float] | None:
    """The noise floor over prompts of these tokens; None where nothing is compared.

    Args:
        lengths: tokens of each with what follows it.
    """
    if not run.engine.fidelity or not rows:
        return None
    check_lengths(run, lengths)
    return noise_floor(run, [list(row[1:]) for row in rows], [row[0] for row in rows])


def noise_floor(run: Run, texts: Sequence[list[int]], first: Sequence[int] = ()) -> dict[str, float]:
    """Mean KL of the full cache against itself, over the beginning of the longest text, by what differs.

    "chunking": forwards of other lengths; "bfloat16": that and, for a model in full precision, its matrix products.

    Args:
        first: the token before each text; the prefix token where there is none.
    """
    assert run.facts is not None
    total = sum(map(len, texts))
    longest = max(range(len(texts)), key=lambda i: len(texts[i]))
    prefix = first[longest] if first else run.lm.prefix_token_id
    tokens = texts[longest][: min(FLOOR_TOKENS, max(LEAST_FLOOR_TOKENS, total // 40))]
    kinds: dict[str, torch.dtype | None] = {"chunking": None}
    if run.lm.model.dtype in (torch.float32, torch.float64) and run.lm.mixed_precision_dtype is None:
        kinds["bfloat16"] = torch.bfloat16
    if not tokens:
        return {}
    found = fidelity.noise_floor(run.lm.model, run.facts, prefix, tokens, list(kinds.values()))
    return {kind: float(one.kl.mean(dtype=np.float64)) for kind, one in zip(kinds, found, strict=True)}

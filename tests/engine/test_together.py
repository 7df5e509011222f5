"""A prompt that is read once for several compressions comes out, under each of them, as if it were the only one.

Random cases in float64: a model, several methods with compositions of settings, a kind of request and prompts of random
lengths. Numbers, kept sets, keys, values and statistics of every row must be those of a run with one compression alone.
"""

from __future__ import annotations

import dataclasses
import random
from functools import partial
from typing import Any

import pytest
import test_rows_apart as apart
import torch
from test_rows_apart import NEW, Case

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.choices import score_for_all
from kv_lm_eval.engine.forward import generate_with
from kv_lm_eval.engine.generate import by_rows
from kv_lm_eval.engine.start import start_for_all
from kv_lm_eval.engine.together import may_share


def draw(rng: random.Random) -> tuple[Case, list[Any]]:
    """A case, and the compressions that share its prefill, its own among them."""
    while True:
        case = apart.draw(rng)
        if case.kind == "documents" or not shares(case):
            continue
        found = [case.compression]
        while len(found) < rng.choice((2, 3, 5)):
            other = apart.draw(rng)
            if other.name == case.name and shares(other) and (other.compression.lossy or not case.question):
                found.append(other.compression)
        if case.question and not case.compression.lossy:
            continue
        return dataclasses.replace(case, stock=False), found


def shares(case: Case) -> bool:
    return may_share(make_cache(case.compression, apart.model(case.name)[1], case.chunk))


def together(case: Case, compressions: list[Any]) -> tuple[list[Any], list[CompressedCache]]:
    """By compression: numbers of the rows and their cache."""
    m, facts = apart.model(case.name)
    new_caches = [partial(make_cache, compression, facts, case.chunk) for compression in compressions]
    if case.kind == "choices":
        tails: Any = case.tails if case.question else case.tail_tokens
        found = score_for_all(m, new_caches, case.rows, case.continuations, tails)
        numbers = [
            [torch.tensor([s for s, _ in group], dtype=torch.float64) for group in scores] for scores, _ in found
        ]
        return numbers, [cache for _, cache in found]
    with torch.no_grad():
        cache, ids, mask, first = start_for_all(m, new_caches, case.rows, case.tails if case.question else None, 0)
        out = m.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
            **generate_with(cache),
            **by_rows(cache, first=first),
        )
    return list(torch.stack(out.logits, dim=1).chunk(len(compressions))), cache.apart(len(compressions))


def check(seed: int) -> None:
    case, compressions = draw(random.Random(seed))
    numbers, caches = together(case, compressions)
    for m, compression in enumerate(compressions):
        own = dataclasses.replace(case, compression=compression)
        alone = apart.outcome(own, list(range(len(case.rows))))
        got = apart.described(numbers[m], caches[m], len(case.rows))
        for b in range(len(case.rows)):
            words = f"seed {seed}: {case.words} chunk={case.chunk} question={case.question} tails={case.tails} "
            words += f"tail_tokens={case.tail_tokens}, {m}: {compression.settings()}, row {b}"
            apart.assert_alike(got[b], alone[b], words)


@pytest.mark.parametrize("seed", range(50, 110))
def test_a_compression_depends_on_its_own_settings_alone(seed: int) -> None:
    check(seed)


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(2000, 2300))
def test_a_compression_depends_on_its_own_settings_alone_in_300_more_cases(seed: int) -> None:
    check(seed)

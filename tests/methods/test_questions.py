"""What a method keeps of a context does not depend on a question that comes after the cut, and where the question is
cut with the rest, methods that say that they look at queries keep something else for another one."""

from __future__ import annotations

import pytest
import tiny

from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.start import start
from kv_lm_eval.methods import base
from kv_lm_eval.methods.compression import Compression

CONTEXT, QUESTION, SLOTS = 70, 9, 16
METHODS = tiny.methods(lambda cls: cls.compresses and cls.uses_cache)
TELLING = {"lazy_threshold": 0.25}  # settings whose own default or example decides all of these prompts alike


def compression(method: str) -> Compression:
    once = {} if base.load(method).ring else {"compress_every": 0}
    telling = {name: value for name, value in TELLING.items() if name in tiny.fields_of(base.load(method))}
    return tiny.compression(**tiny.free(method, SLOTS, **once, **telling))


def kept_of_context(method: str, question: list[int], apart: bool, context: int = CONTEXT) -> list[list[list[int]]]:
    """Positions of the context that are left, by layer and head, when the answer begins."""
    pair, row = tiny.pair("llama"), tiny.tokens(context, seed=1) + question
    made = compression(method)
    tails = [len(question)] if apart else None
    cache, ids, _, _ = start(pair.model, lambda: make_cache(made, pair.facts), [row], tails, 0)
    seen = cache.seen[0] if cache.batch else 0
    tiny.forward(pair.model, cache, [ids[0, seen:].tolist()], [seen])
    assert cache.seen == [len(row)]
    return [[[t for t in head if t < context] for head in tiny.kept(cache, layer)] for layer in range(2)]


def looks(method: str) -> bool:
    """Whether it declares that its scores come from queries, whatever they look at beside."""
    scorer = compression(method).method
    return bool(scorer.num_queries or scorer.accumulates or scorer.reads_again or scorer.moments_from is not None)


@pytest.mark.parametrize("method", METHODS)
def test_a_question_after_the_cut_changes_nothing_of_what_is_kept(method: str) -> None:
    if base.load(method).ring:
        pytest.skip("every token overwrites another: a question too")
    questions = [tiny.tokens(n, seed=seed) for n, seed in ((QUESTION, 7), (QUESTION, 8), (1, 9))]
    kept = [kept_of_context(method, question, apart=True) for question in questions]
    assert kept[0] == kept[1] == kept[2]
    if base.load(method).takes_budget:
        assert all(len(head) < CONTEXT for layer in kept[0] for head in layer), "or nothing was cut"


@pytest.mark.parametrize("method", [name for name in METHODS if looks(name)])
def test_a_question_in_the_prompt_changes_what_is_kept_by_those_that_look_at_queries(method: str) -> None:
    first = kept_of_context(method, tiny.tokens(QUESTION, seed=7), apart=False)
    others = (kept_of_context(method, tiny.tokens(QUESTION, seed=seed), apart=False) for seed in range(8, 60))
    assert any(other != first for other in others)

"""Continuations over a shared, compressed context score as if each had been run alone, token by token."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch

from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.choices import score_continuations

CONTEXTS = (41, 24, 9)
CONTINUATIONS = ((1, 4, 9), (2,), (6, 3))
METHODS = {
    **{name: tiny.free(name, 12) for name in tiny.methods(tiny.chooses)},
    "snapkv online": {"method": "snapkv", "window_size": 4, "max_capacity_prompt": 12, "compress_every": 3},
    "knorm": {"method": "knorm", "keep_ratio": 0.4},
    "h2o every 3": {"method": "h2o", "max_capacity_prompt": 12, "compress_every": 3},
    "random": {"method": "random", "max_capacity_prompt": 12, "compress_every": 2},
    "window": {"method": "window", "window_size": 12, "compress_every": 4},
    "streaming_llm in_cache": {"method": "streaming_llm", "n_sink": 2, "window_size": 10, "compress_every": 2},
}
Score = tuple[float, bool]
Scores = list[list[Score]]


def batch(contexts: tuple[int, ...] = CONTEXTS) -> tuple[list[list[int]], list[list[list[int]]]]:
    rows = [tiny.tokens(n, seed=n) for n in contexts]
    groups = [[tiny.tokens(n, seed=100 + 10 * b + n) for n in lengths] for b, lengths in enumerate(CONTINUATIONS)]
    return rows, groups[: len(rows)]


def scored(
    pair: tiny.Pair, rows: list[list[int]], groups: list[list[list[int]]], tail: int, **settings: object
) -> Scores:
    return score_continuations(pair.model, lambda: pair.cache(**settings), rows, groups, tail)[0]


def stock_score(pair: tiny.Pair, context: list[int], continuation: list[int]) -> Score:
    with torch.inference_mode():
        logits = pair.stock(input_ids=torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    log_probs = logits.log_softmax(-1)[torch.arange(len(continuation)), continuation]
    return float(log_probs.sum()), logits.argmax(-1).tolist() == continuation


def loop_scores(
    pair: tiny.Pair, rows: list[list[int]], groups: list[list[list[int]]], tail: int, **settings: object
) -> Scores:
    return [
        [loop_score(pair, row, c, tail, **settings) for c in group] for row, group in zip(rows, groups, strict=True)
    ]


def loop_score(pair: tiny.Pair, context: list[int], continuation: list[int], tail: int, **settings: object) -> Score:
    """The context up to its tail in one forward with a cut after it, then one token a forward."""
    cache = pair.cache(**settings)
    head = context[: max(0, len(context) - tail)]
    if head:
        logits = tiny.forward(pair.model, cache, [head])[0, -1]
    else:  # the tail's ticks of the schedule's clock pass for the tokens that a short context lacks, too
        cache.mode = "decode"
        cache.set(decoded=tail - len(context))
    total, greedy = 0.0, True
    for i, token in enumerate(context[len(head) :] + continuation):
        if len(head) + i >= len(context):
            total += float(logits.log_softmax(-1)[token])
            greedy = greedy and int(logits.argmax()) == token
        logits = tiny.forward(pair.model, cache, [[token]], starts=[len(head) + i])[0, -1]
    return total, greedy


def assert_close(got: Scores, expected: Scores) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        for (a, a_greedy), (b, b_greedy) in zip(ours, theirs, strict=True):
            assert abs(a - b) <= 2e-4 and a_greedy == b_greedy


@pytest.mark.parametrize("tail", [0, 1, 3])
@pytest.mark.parametrize("name", tiny.CORE)
def test_continuations_under_the_full_cache_score_as_stock_forwards_over_everything(name: str, tail: int) -> None:
    pair = tiny.pair(name)
    rows, groups = batch()
    expected = [[stock_score(pair, row, c) for c in group] for row, group in zip(rows, groups, strict=True)]
    assert_close(scored(pair, rows, groups, tail, method="full"), expected)


@pytest.mark.parametrize("name", tiny.CORE)
def test_single_continuations_under_the_full_cache_score_as_stock_forwards(name: str) -> None:
    pair = tiny.pair(name)
    rows, groups = batch()
    groups = [[max(group, key=len)] for group in groups]
    expected = [[stock_score(pair, row, group[0])] for row, group in zip(rows, groups, strict=True)]
    assert_close(scored(pair, rows, groups, 1, method="full"), expected)


@pytest.mark.parametrize(
    ("name", "method", "tail"),
    [(*case, tail) for case in tiny.cases(METHODS, ["llama"]) for tail in (0, 1, 3)]
    + [(*case, 1) for case in tiny.cases(METHODS, [n for n in tiny.CORE if n != "llama"])],
)
def test_continuations_score_as_each_alone_token_by_token(name: str, method: str, tail: int) -> None:
    pair = tiny.pair(name)
    rows, groups = batch()
    expected = loop_scores(pair, rows, groups, tail, **METHODS[method])
    assert_close(scored(pair, rows, groups, tail, **METHODS[method]), expected)


@pytest.mark.parametrize("lengths", [(41, 2, 3), (1, 2, 3)], ids=["some", "all"])
def test_contexts_within_the_tail_score_as_stock_forwards_under_the_full_cache(
    lengths: tuple[int, ...],
) -> None:
    pair = tiny.pair("llama")
    rows, groups = batch(lengths)
    expected = [[stock_score(pair, row, c) for c in group] for row, group in zip(rows, groups, strict=True)]
    assert_close(scored(pair, rows, groups, 3, method="full"), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [(41, 2, 3), (1, 2, 3)], ids=["some", "all"])
def test_contexts_within_the_tail_score_as_each_alone(method: str, lengths: tuple[int, ...]) -> None:
    pair = tiny.pair("llama")
    rows, _ = batch(lengths)
    groups = [[tiny.tokens(n, seed=n) for n in (20, 1, 14)] for _ in rows]  # long enough to be cut themselves
    expected = loop_scores(pair, rows, groups, 3, **METHODS[method])
    assert_close(scored(pair, rows, groups, 3, **METHODS[method]), expected)


@pytest.mark.parametrize("name", tiny.CORE)
def test_packed_equals_forks(name: str) -> None:
    """A schedule whose next cut never comes takes the path of the forks, and must not change a number."""
    pair, settings = tiny.pair(name), METHODS["snapkv"]
    rows, groups = batch()
    packed = scored(pair, rows, groups, 1, **settings)
    forks = scored(pair, rows, groups, 1, **{**settings, "compress_every": 1000})
    assert_close(packed, forks)


@pytest.mark.parametrize("method", METHODS)
def test_one_letter_answers_feel_the_compression_only_behind_a_tail(method: str) -> None:
    pair = tiny.pair("llama")
    rows, letters = [tiny.tokens(60)], [[[t] for t in (11, 12, 13, 14)]]
    full = scored(pair, rows, letters, 0, method="full")
    blind = scored(pair, rows, letters, 0, **METHODS[method])
    felt = scored(pair, rows, letters, 1, **METHODS[method])
    # Exactly, but for methods that count attention: their outputs come from the weights that are counted
    counts = pair.cache(**METHODS[method]).compression.method.accumulates
    assert max(abs(a[0] - b[0]) for a, b in zip(blind[0], full[0], strict=True)) <= (1e-4 if counts else 0)
    moved = [abs(a[0] - b[0]) for a, b in zip(felt[0], full[0], strict=True)]
    assert min(moved) > 0 and max(moved) > 1e-2


def test_scoring_leaves_the_cache_of_the_contexts_as_it_was() -> None:
    pair = tiny.pair("llama")
    rows, groups = batch()
    _, cache = score_continuations(pair.model, lambda: pair.cache(**METHODS["snapkv"]), rows, groups, 1)
    assert cache.seen == list(CONTEXTS)
    assert cache.held == [[13, 13, 9]] * 2, "the budget and the tail; 9 tokens are under the budget"


def test_the_order_of_contexts_and_of_continuations_makes_no_difference() -> None:
    pair = tiny.pair("llama")
    rows, groups = batch()
    got = scored(pair, rows, groups, 1, **METHODS["h2o"])
    turned = scored(pair, rows[::-1], [g[::-1] for g in groups[::-1]], 1, **METHODS["h2o"])
    assert_close(got, [g[::-1] for g in turned[::-1]])


@pytest.mark.parametrize("chunk", [None, 3, 16])
def test_logits_of_a_context_are_not_computed_where_one_continuation_follows_it(chunk: int | None) -> None:
    """A vocabulary of 128k times a context of 128k does not fit anywhere."""
    pair, columns = tiny.pair("llama"), []
    hook = pair.model.lm_head.register_forward_hook(lambda module, args, out: columns.append(out.shape[:2].numel()))
    rows, continuations = [tiny.tokens(40), tiny.tokens(23, seed=1)], [[[5, 6, 7, 8, 9]], [[4, 3]]]
    new_cache = partial(make_cache, tiny.compression(method="full"), pair.facts, chunk)
    try:
        got, _ = score_continuations(pair.model, new_cache, rows, continuations, 1)
    finally:
        hook.remove()
    assert max(columns) <= 2 * 5
    for row, (ids,), ((score, greedy),) in zip(rows, continuations, got, strict=True):
        with torch.inference_mode():
            log_probs = pair.stock(torch.tensor([row + ids[:-1]])).logits[0].log_softmax(-1)[len(row) - 1 :]
        assert score == pytest.approx(float(log_probs.gather(1, torch.tensor(ids)[:, None]).sum()), abs=1e-4)
        assert greedy == bool((log_probs.argmax(-1) == torch.tensor(ids)).all())

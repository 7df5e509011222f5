"""Query-agnostic compression equals: the context alone, cut, then its question one token at a time, each row alone."""

from __future__ import annotations

import pytest
import tiny
import torch

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.question import Contexts, as_fed, prefill_before_question

LENGTHS = (50, 31, 9, 40)
ANY, ONE_LENGTH = (12, 1, 9, 5), (9, 9, 9, 9)  # a question of one token; a prompt that is all question
NEW = 8
METHODS = {
    "snapkv": {"method": "snapkv", "window_size": 4, "kernel_size": 3, "max_capacity_prompt": 12},
    "snapkv every 3": {"method": "snapkv", "window_size": 4, "max_capacity_prompt": 12, "compress_every": 3},
    "snapkv excess": {
        **{"method": "snapkv", "window_size": 4, "max_capacity_prompt": 12},
        **{"compress_every": 3, "trigger": "excess"},
    },
    "knorm": {"method": "knorm", "keep_ratio": 0.4},
    "h2o every 4": {"method": "h2o", "max_capacity_prompt": 12, "compress_every": 4},
    "tova": {"method": "tova", "max_capacity_prompt": 12},
    "streaming_llm in_cache": {"method": "streaming_llm", "n_sink": 2, "window_size": 10, "compress_every": 2},
}


def tails(method: str) -> tuple[int, ...]:
    """Where cuts are to come, rows whose questions have one length are run together."""
    return ONE_LENGTH if tiny.compression(**METHODS[method]).schedule.online else ANY


def rows() -> list[list[int]]:
    return [tiny.tokens(n, seed=n) for n in LENGTHS]


def fed_alone(pair: tiny.Pair, row: list[int], tail: int, **settings: object) -> CompressedCache:
    """The context in one forward with a cut after it, then the question but its last token, one token a forward."""
    cache = pair.cache(**settings)
    start = len(row) - tail
    if start:
        tiny.forward(pair.model, cache, [row[:start]])
    cache.mode = "hold" if cache.compression.schedule.online else "decode"
    for i in range(start, len(row) - 1):
        tiny.forward(pair.model, cache, [[row[i]]], starts=[i])
    cache.set(mode="decode", decoded=0)
    return cache


def kept(cache: CompressedCache, layer: int, row: int = 0) -> list[list[int]]:
    """As tiny.kept, one list where all heads hold the same."""
    heads = tiny.kept(cache, layer, row)
    return heads if any(head != heads[0] for head in heads) else heads[:1]


@pytest.mark.parametrize(("name", "method"), tiny.cases(METHODS))
def test_the_cache_of_a_batch_is_that_of_each_row_alone_token_by_token(name: str, method: str) -> None:
    pair = tiny.pair(name)
    got = prefill_before_question(pair.model, lambda: pair.cache(**METHODS[method]), rows(), tails(method))
    assert got.seen == [n - 1 for n in LENGTHS]
    for b, (row, tail) in enumerate(zip(rows(), tails(method), strict=True)):
        alone = fed_alone(pair, row, tail, **METHODS[method])
        for layer in range(2):
            if pair.facts.compressible(layer):
                assert kept(got, layer, b) == kept(alone, layer)


@pytest.mark.parametrize(("name", "method"), tiny.cases(METHODS))
def test_generation_goes_on_as_for_each_row_alone(name: str, method: str) -> None:
    pair, expected = tiny.pair(name), []
    for row, tail in zip(rows(), tails(method), strict=True):
        cache, token, out = fed_alone(pair, row, tail, **METHODS[method]), row[-1], []
        for i in range(NEW):
            logits = tiny.forward(pair.model, cache, [[token]], starts=[len(row) - 1 + i])
            token = int(logits[0, -1].argmax())
            out.append(token)
        expected.append(out)
    assert generated(pair, METHODS[method], tails(method)) == expected


def generated(pair: tiny.Pair, settings: dict[str, object], tails: tuple[int, ...], beams: int = 1) -> list[list[int]]:
    with torch.inference_mode():
        cache = prefill_before_question(pair.model, lambda: pair.cache(**settings), rows(), tails)
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        ids, mask = as_fed(rows(), tails, pad=0)
        out = pair.model.generate(
            ids,
            attention_mask=mask,
            **tiny.given(cache),
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            num_beams=beams,
            pad_token_id=0,
            eos_token_id=None,
            do_sample=False,
        )
    return out[:, ids.shape[1] :].tolist()


def test_beams_start_from_the_same_question() -> None:
    """Without eviction, beam search over the pre-filled cache is that of stock transformers over the whole prompt."""
    pair = tiny.pair("llama")
    ids, mask, _ = tiny.left_padded(rows())
    with torch.inference_mode():
        expected = pair.stock.generate(
            ids,
            attention_mask=mask,
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            num_beams=3,
            pad_token_id=0,
            eos_token_id=None,
            do_sample=False,
        )[:, ids.shape[1] :].tolist()
    assert generated(pair, {"method": "full"}, ANY, beams=3) == expected


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_snapkv_is_a_stock_forward_in_which_the_question_sees_what_the_context_alone_kept(name: str) -> None:
    """One layer, so that one mask [B, H, q, k] can say which pairs each head of it kept."""
    settings = METHODS["snapkv"]
    model, stock = tiny.build(name, num_hidden_layers=1), tiny.build(name, num_hidden_layers=1)
    facts = wrap(model, tiny.compression(**settings))
    row, tail = tiny.tokens(60, seed=3), 13
    head = len(row) - tail
    context_only = CompressedCache(tiny.compression(**settings), facts)
    tiny.forward(model, context_only, [row[:head]])
    kept = tiny.kept(context_only, 0)
    cache = prefill_before_question(model, lambda: CompressedCache(tiny.compression(**settings), facts), [row], [tail])
    assert [[p for p in own if p < head] for own in tiny.kept(cache, 0)] == kept
    got = tiny.forward(model, cache, [row[-1:]], starts=[len(row) - 1])[0, -1]

    heads = stock.config.num_attention_heads
    mask = torch.ones(len(row), len(row)).tril().bool().repeat(1, heads, 1, 1)
    for h in range(heads):
        own = kept[h * len(kept) // heads]
        evicted = [p for p in range(head) if p not in own]
        mask[0, h, head:, evicted] = False
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        expected = stock(input_ids=torch.tensor([row]), attention_mask=bias).logits[0, -1]
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_continuations_score_as_each_alone_token_by_token(name: str, method: str) -> None:
    pair = tiny.pair(name)
    groups = [[tiny.tokens(n, seed=10 * b + n) for n in (3, 1, 6)] for b in range(len(LENGTHS))]
    got, cache = score_continuations(pair.model, lambda: pair.cache(**METHODS[method]), rows(), groups, tails(method))
    assert cache.seen == list(LENGTHS)
    for row, tail, group, scores in zip(rows(), tails(method), groups, got, strict=True):
        for continuation, (score, _) in zip(group, scores, strict=True):
            alone, total = fed_alone(pair, row, tail, **METHODS[method]), 0.0
            for i, (token, target) in enumerate(zip([row[-1], *continuation], continuation, strict=False)):
                logits = tiny.forward(pair.model, alone, [[token]], starts=[len(row) - 1 + i])[0, -1]
                total += float(logits.log_softmax(-1)[target])
            assert score == pytest.approx(total, abs=2e-4)


def test_a_context_is_held_from_its_first_question_to_its_last() -> None:
    pair, heads = tiny.pair("llama"), [tuple(tiny.tokens(n, seed=n)) for n in (14, 9)]
    asked = [heads[0], heads[1], (), heads[0]]
    contexts, new_cache = Contexts(asked), lambda: pair.cache(method="knorm", max_capacity_prompt=6)
    for some, held in (([0], [heads[0]]), ([1, 2], [heads[0]]), ([3], []), ([3, 0], [])):
        (cache,) = contexts.forks(pair.model, [new_cache], [asked[i] for i in some])
        assert cache.seen == [len(asked[i]) for i in some]
        assert list(contexts._held) == held

"""quest: which pages a query reads and what they cost, against plain loops in float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import tiny
import torch

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.cache.paged import Paged, best_pages
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.cache.view import Pages
from kv_lm_eval.config import parse
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.forward import generate_with
from kv_lm_eval.engine.generate import by_rows
from kv_lm_eval.engine.prefill import feed
from kv_lm_eval.engine.question import prefill_before_question
from kv_lm_eval.engine.start import start
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError

MODELS = ("llama", "gpt_neox")
LENGTHS = (45, 30, 7)
SETTINGS = {"method": "quest", "page_size": 4, "token_budget": 16, "dense_layers": 1}


@functools.cache
def model(name: str) -> tuple[Any, Any]:
    built = tiny.build(name)
    facts = tiny.wrap(built, tiny.compression(method="full"))
    return built.double(), facts


def new_cache(name: str, **settings: object) -> CompressedCache:
    return make_cache(tiny.compression(**{**SETTINGS, **settings}), model(name)[1])


class Watched:
    """Every layer's queries, keys and values of a row that is alone in its cache, and what attention made of them."""

    def __init__(self, cache: CompressedCache) -> None:
        self.seen: list[tuple[Any, torch.Tensor]] = []
        segment = cache.segments[0]
        original = segment.attend
        segment.attend = lambda step: self.note(step, original(step))  # type: ignore[method-assign]

    def note(self, step: Any, out: torch.Tensor) -> torch.Tensor:
        self.seen.append((step, out))
        return out


def reads(query: list[float], keys: list[list[float]], size: int, most: int) -> set[int]:
    """Positions that a query head reads of the keys of its KV head."""
    bounds = []
    for page in range(math.ceil(len(keys) / size)):
        own = keys[page * size : (page + 1) * size]
        bound = sum(max(q * min(k[d] for k in own), q * max(k[d] for k in own)) for d, q in enumerate(query))
        bounds.append((-bound, page))
    chosen = {page for _, page in sorted(bounds)[:most]}
    return {t for t in range(len(keys)) if t // size in chosen}


def attended(query: list[float], keys: list[Any], values: list[Any], some: set[int], scaling: float) -> list[float]:
    logits = {t: scaling * sum(q * k for q, k in zip(query, keys[t], strict=True)) for t in some}
    top = max(logits.values())
    weights = {t: math.exp(x - top) for t, x in logits.items()}
    total = sum(weights.values())
    return [sum(w * values[t][d] for t, w in weights.items()) / total for d in range(len(values[0]))]


def check(watched: Watched, prompt: int, budget: int, dense: int) -> list[list[set[int]]]:
    """Compares every forward after the prompt's with the loops; positions read by layer and KV head, of the last."""
    held: dict[int, tuple[list[Any], list[Any]]] = {}
    last: dict[int, list[set[int]]] = {}
    for step, out in watched.seen:
        keys, values = held.setdefault(step.layer, ([[] for _ in range(step.key.shape[1])], []))
        if not values:
            values.extend([] for _ in range(step.key.shape[1]))
        group = step.query.shape[1] // step.key.shape[1]
        last[step.layer] = [set() for _ in keys]
        for at in range(step.tokens):
            for h in range(step.key.shape[1]):
                keys[h].append(step.key[0, h, at].tolist())
                values[h].append(step.value[0, h, at].tolist())
            n = len(keys[0])
            if n < prompt:
                continue
            last[step.layer] = [set() for _ in keys]
            for head in range(step.query.shape[1]):
                h, query = head // group, step.query[0, head, at].tolist()
                some = set(range(n))
                if step.layer >= dense and n > prompt:  # the prompt is read whole
                    some = reads(query, keys[h], 4, max(3, budget // 4))
                last[step.layer][h] |= some
                expected = attended(query, keys[h], values[h], some, step.scaling)
                assert out[0, head, at].tolist() == pytest.approx(expected, abs=1e-9), (step.layer, head, n)
    return [last[layer] for layer in sorted(last)]


@pytest.mark.parametrize("budget", [1, 16, 23])
@pytest.mark.parametrize("name", MODELS)
def test_every_query_head_reads_its_best_pages(name: str, budget: int) -> None:
    net, row = model(name)[0], tiny.tokens(45, seed=1)
    cache = new_cache(name, token_budget=budget)
    assert isinstance(cache.segments[0], Paged)
    watched = Watched(cache)
    for fed in (row[:38], [row[38]], row[39:43], [row[43]], [row[44]]):
        feed(net, cache, [fed])
    read = check(watched, 38, budget, dense=1)
    d, heads = cache.stores[0].keys.shape[3], cache.stores[0].keys.shape[1]
    pairs = sum(len(head) for layer in read for head in layer)
    bounds = heads * math.ceil(45 / 4)  # of the one layer that is not read whole: two vectors each, as a pair has
    sizes = cache.snapshot()
    assert sizes["kv_bytes_read"] == [(pairs + bounds) * 2 * d * 8] and sizes["compressed"] == [True]
    assert sizes["kv_bytes_valid"] == [2 * heads * 45 * 2 * d * 8] and sizes["kept_fraction"] == [1.0]
    assert pairs < 2 * heads * 45


def test_pages_lie_where_their_positions_do_whatever_the_first_is() -> None:
    """Of tokens 6 .. 16 in pages of four, 6 and 7 are one, then 8 .. 11, 12 .. 15, and 16."""
    keys = torch.zeros(1, 1, 11, 2, dtype=torch.float64)
    query = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    keys[0, 0, 2 + 3, 0] = 5  # token 11
    keys[0, 0, 2 + 4, 0] = -5  # token 12
    keys[0, 0, 1, 1] = 1  # token 7
    mask, count = best_pages(query, keys, 6, Pages(4, 1, 0))
    assert count == 4
    read = [[6 + i for i in row.nonzero().squeeze(1).tolist()] for row in mask[0, 0]]
    assert read == [[8, 9, 10, 11], [12, 13, 14, 15], [6, 7]]


def test_rows_of_a_batch_read_as_they_do_alone_and_short_ones_read_all() -> None:
    net, rows = model("llama")[0], [tiny.tokens(n, seed=n) for n in LENGTHS]
    cache = new_cache("llama")
    alone = [new_cache("llama") for _ in rows]
    for step in range(4):
        fed = rows if not step else [[3 + step]] * 3
        together = feed(net, cache, fed, keep=1)
        for b in range(3):
            own = feed(net, alone[b], [fed[b]], keep=1)[0]
            assert torch.allclose(together[b], own, atol=1e-10)
            for name, value in alone[b].snapshot().items():
                if isinstance(value, list):
                    assert cache.snapshot()[name][b] == pytest.approx(value[0])
    sizes = cache.snapshot()
    assert sizes["kv_bytes_read"][2] == sizes["kv_bytes_valid"][2] and not sizes["compressed"][2]
    assert sizes["kv_bytes_read"][0] < sizes["kv_bytes_valid"][0]


def test_a_budget_for_all_is_the_full_cache_and_others_read_all_that_they_hold() -> None:
    net, row = model("llama")[0], tiny.tokens(40, seed=1)
    full = make_cache(tiny.compression(method="full"), model("llama")[1])
    wide = new_cache("llama", token_budget=44)
    for fed in (row[:37], *([t] for t in row[37:])):
        assert torch.allclose(feed(net, full, [fed])[0], feed(net, wide, [fed])[0], atol=1e-10)
    assert full.snapshot()["kv_bytes_read"] == full.snapshot()["kv_bytes_valid"] == wide.snapshot()["kv_bytes_read"]
    cut = make_cache(tiny.compression(method="knorm", max_capacity_prompt=9), model("llama")[1])
    feed(net, cut, [row])
    assert cut.snapshot()["kv_bytes_read"] == cut.snapshot()["kv_bytes_valid"]


def test_a_question_is_read_whole_and_the_answer_is_not() -> None:
    net, row = model("llama")[0], tiny.tokens(44, seed=1)
    cache = prefill_before_question(net, lambda: new_cache("llama", dense_layers=0), [row], [6])
    full = prefill_before_question(net, lambda: new_cache("llama", token_budget=99), [row], [6])
    for a, b in zip(cache.stores, full.stores, strict=True):
        assert torch.equal(a.keys, b.keys), "the same until the last token of the question"
    assert not torch.allclose(feed(net, cache, [row[-1:]])[0], feed(net, full, [row[-1:]])[0], atol=1e-6)


def test_all_kinds_of_requests_read_token_by_token() -> None:
    net, rows = model("gpt_neox")[0], [tiny.tokens(33, seed=1), tiny.tokens(20, seed=2)]

    def make() -> CompressedCache:
        return new_cache("gpt_neox", dense_layers=0)

    def log_prob(context: list[int], after: list[int]) -> float:
        cache, total = make(), 0.0
        logits = feed(net, cache, [context[:-1]])
        for token, target in zip([context[-1], *after[:-1]], after, strict=True):
            logits = feed(net, cache, [[token]])[0]
            total += float(logits[-1].detach().log_softmax(-1)[target])
        return total

    choices = [[[5, 6, 7], [8], [9, 5]], [[7, 7]]]
    found, _ = score_continuations(net, make, rows, choices, 1)
    for row, group, scores in zip(rows, choices, found, strict=True):
        assert [score for score, _ in scores] == pytest.approx([log_prob(row, c) for c in group], abs=1e-8)

    document = tiny.tokens(40, seed=3)
    (scored,), _ = score_documents(net, make, [document], Stream(1, 64))
    stepwise, cache = [], make()
    cache.mode = "decode"
    for token, target in zip([1, *document[:-1]], document, strict=True):
        stepwise.append(float(feed(net, cache, [[token]])[0][-1].detach().log_softmax(-1)[target]))
    assert scored.log_probs.tolist() == pytest.approx(stepwise, abs=1e-5)

    words = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answers, read = [], []
    with torch.no_grad():
        for loop in (by_rows, lambda cache: by_rows(cache, compiled=True)):
            cache, ids, mask, _ = start(net, make, rows, None, 0)
            own = loop(cache)
            out = net.generate(ids, attention_mask=mask, **words, **generate_with(cache), **own)
            answers.append(out.tolist())
            read.append(cache.snapshot()["kv_bytes_read"])
    assert answers[0] == answers[1] and read[0] == pytest.approx(read[1])


@pytest.mark.parametrize("name", ["mistral_sliding", "gemma3", "gemma2"])
def test_pages_of_layers_with_windows_of_their_own_are_those_of_positions(name: str) -> None:
    """Sliding layers beside full ones are read whole; where all slide, the pages are of what the window shows."""
    net = tiny.build(name)
    facts = tiny.wrap(net, tiny.compression(method="full"))
    row, outs = tiny.tokens(70, seed=1), []
    for budget in (999, 12):
        cache = make_cache(tiny.compression(**{**SETTINGS, "token_budget": budget, "dense_layers": 0}), facts)
        outs.append([feed(net, cache, [fed], keep=1)[0] for fed in (row[:66], *([t] for t in row[66:]))])
    full = make_cache(tiny.compression(method="full"), facts)
    whole = [feed(net, full, [fed], keep=1)[0] for fed in (row[:66], *([t] for t in row[66:]))]
    for a, b in zip(outs[0], whole, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert not torch.allclose(outs[1][-1], whole[-1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_reads_finite_numbers(dtype: torch.dtype) -> None:
    net = tiny.build("llama").to(dtype)
    facts = tiny.wrap(net, tiny.compression(method="full"))
    cache = make_cache(tiny.compression(**SETTINGS), facts)
    for fed in ([tiny.tokens(40), tiny.tokens(5)], [[3], [4]], [[5], [6]]):
        logits = feed(net, cache, fed)
        assert all(own.isfinite().all() and own.dtype == dtype for own in logits.values())
    assert cache.stores[0].keys.dtype == dtype and cache.snapshot()["kv_bytes_read"][0] > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"token_budget": 0}, "token_budget=0 must be at least 1"),
        ({"page_size": 0}, "page_size=0 must be at least 1"),
        ({"dense_layers": -1}, "dense_layers=-1 must be at least 0"),
        ({"max_capacity_prompt": 9}, "unknown setting 'max_capacity_prompt'"),
        ({"nbits": 4}, "unknown setting 'nbits'"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse({**SETTINGS, **settings}, pass_through=set())


def test_no_other_kind_of_segment_serves_it() -> None:
    with pytest.raises(TypeError, match="Segment cannot serve a method with pages="):
        Segment(tiny.compression(**SETTINGS), model("llama")[1])

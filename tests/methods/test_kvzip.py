"""kvzip: what a repetition of the text attends to, against plain loops over a stock model's attention in float64.

A softmax over some keys is the softmax over all of them, divided by what these had of it: the loops see nothing but the
stock model's eager attention over the text and one repetition behind it.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
from methods.test_kept_sets import Stock, best
from methods.test_open_budgets import best_of_all, held

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import Words
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.again import words_of
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.choices import score_continuations
from kv_lm_eval.engine.forward import generate_with
from kv_lm_eval.engine.generate import by_rows
from kv_lm_eval.engine.prefill import feed, prefill
from kv_lm_eval.engine.question import prefill_before_question
from kv_lm_eval.engine.start import start
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError

MODELS = ("llama", "gpt_neox")
LENGTHS = (45, 30, 7)
SINKS = 2
WORDS = tiny.WORDS
CHAT = Words(tiny.WORDS.encode, head=[5, 6, 7], tail=[8, 9])
FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"


@functools.cache
def model(name: str) -> tuple[Any, Any]:
    built = tiny.build(name)
    facts = wrap(built, tiny.compression(method="full"))
    facts.words = WORDS
    return built.double(), facts


class Double(Stock):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.model.double()


def rereads(text: list[int], chunk: int, words: Words = WORDS) -> list[tuple[int, int, list[int]]]:
    """First and last token of each part, and what is fed for it."""
    chat = bool(words.head) and text[: len(words.head)] == list(words.head)
    at, found = (len(words.head) if chat else 0), []
    tail = list(words.tail) if chat else words.encode("\n")
    while at < len(text):
        part = text[at : at + chunk]
        if not found:
            request = words.encode(FIRST)
        else:
            request = words.encode(LATER) + text[at - chunk : at][-8:]
        found.append((at, at + len(part), request + tail + part))
        at += len(part)
    return found


def scores(
    stock: Stock, text: list[int], chunk: int, words: Words = WORDS, sinks: int = SINKS, plus: Any = None
) -> Any:
    """By layer and KV head, of each position; plus: by layer and query head, what counts beside attention."""
    n = len(text)
    found = [
        [{t: float("inf") if t < sinks else 0.0 for t in range(n)} for _ in range(stock.kv_heads)]
        for _ in range(stock.layers)
    ]
    for first, last, again in rereads(text, chunk, words):
        for layer, weights in enumerate(stock.attentions(text + again)):
            for head in range(stock.kv_heads):
                own = found[layer][head]
                for h in range(head * stock.group, (head + 1) * stock.group):
                    for q in range(n, n + len(again)):
                        row = weights[h][q]
                        seen = sum(row[: min(sinks, first)]) + sum(row[first:last]) + sum(row[n : q + 1])
                        for t in range(max(first, sinks), last):
                            counts = 1.0 if plus is None else plus(text + again, layer, h, q, t)
                            own[t] = max(own[t], row[t] / seen * counts)
    return found


def zipped(name: str, rows: list[list[int]], words: Words = WORDS, **settings: object) -> CompressedCache:
    net, facts = model(name)
    facts.words = words
    compression = tiny.compression(**{"method": "kvzip", "n_sink": SINKS, **settings})
    cache, _ = prefill(net, lambda: make_cache(compression, facts), rows)
    return cache


@pytest.mark.parametrize("chunk", [100, 16, 5])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_repetition_looks_at_stays(name: str, chunk: int) -> None:
    stock, rows = Double(name), [tiny.tokens(n, seed=n) for n in LENGTHS]
    cache = zipped(name, rows, max_capacity_prompt=9, chunk_size=chunk)
    for i, row in enumerate(rows):
        assert held(cache, i) == best_of_all(scores(stock, row, chunk), 9), f"row of {len(row)} tokens"
    assert cache.seen == list(LENGTHS) and [len(s.texts) for s in cache.segments] == [1, 1, 1]
    alone = zipped(name, rows[:1], max_capacity_prompt=9, chunk_size=chunk)
    assert held(alone, 0) == held(cache, 0)


@pytest.mark.parametrize("name", MODELS)
def test_layers_may_keep_as_many_each(name: str) -> None:
    stock, row = Double(name), tiny.tokens(40, seed=2)
    whole = scores(stock, row, 16)
    cache = zipped(name, [row], keep_ratio=0.25, chunk_size=16, layer_budget="uniform")
    assert held(cache, 0) == [[best(head, 10) for head in layer] for layer in whole]
    shared = {"layer_budget": "uniform", "head_budget": "ada", "alpha": 0}
    cache = zipped(name, [row], keep_ratio=0.25, chunk_size=16, **shared)
    assert held(cache, 0) == [best_of_all([layer], 10)[0] for layer in whole]
    cache = zipped(name, [row], threshold=0.05, threshold_recent=3, chunk_size=16, layer_budget="uniform")
    stays = [[{t for t, s in head.items() if s >= 0.05 or t >= 37} for head in layer] for layer in whole]
    assert held(cache, 0) == stays and 3 < min(len(h) for layer in stays for h in layer) < 40


def test_a_prompt_in_the_chat_format_is_repeated_without_its_beginning_and_in_that_format() -> None:
    stock, rows = Double("llama"), [[5, 6, 7, *tiny.tokens(30, seed=1)], [5, 6, 8, *tiny.tokens(30, seed=2)]]
    cache = zipped("llama", rows, CHAT, max_capacity_prompt=9, chunk_size=16)
    for i, row in enumerate(rows):
        assert held(cache, i) == best_of_all(scores(stock, row, 16, CHAT), 9)
    assert {2} & set().union(*(h for layer in held(cache, 1) for h in layer)), "no chat: its third token is a candidate"
    assert [len(p) for _, _, p in rereads(rows[0], 16, CHAT)] == [11 + 2 + 16, 11 + 8 + 2 + 14]


@pytest.mark.parametrize("name", ["mistral_sliding", "gemma3", "gemma2"])
def test_layers_with_windows_of_their_own(name: str) -> None:
    """Those beside full attention are left alone; where all are, what no later query sees goes first."""
    net = tiny.build(name)
    facts = wrap(net, tiny.compression(method="full"))
    facts.words = WORDS
    compression = tiny.compression(method="kvzip", n_sink=0, max_capacity_prompt=8, chunk_size=16)
    row, stock = tiny.tokens(50, seed=1), Stock(name)
    cache, _ = prefill(net, lambda: make_cache(compression, facts), [row])
    whole = scores(stock, row, 16, sinks=0)
    cut = facts.cut_layers
    if facts.all_sliding:
        whole = [[{t: s for t, s in head.items() if t >= 50 - 23} for head in layer] for layer in whole]
    expected = best_of_all([whole[i] for i in cut], 8)
    got = held(cache, 0)
    assert [got[i] for i in cut] == expected
    for i in set(range(facts.num_layers)) - set(cut):
        assert got[i] == [set(range(27, 50))] * 2 or got[i] == [set(range(50))] * 2


# --- roads ----------------------------------------------------------------------------------------------------------


def test_nothing_of_a_repetition_is_left_behind() -> None:
    """Not in the store, nor in the logits, positions and numbers that come after it."""
    net, facts = model("llama")
    facts.words = WORDS
    rows = [tiny.tokens(30, seed=1), tiny.tokens(18, seed=2)]
    full = make_cache(tiny.compression(method="full"), facts)
    mine = make_cache(tiny.compression(method="kvzip", threshold=-1, threshold_recent=0, layer_budget="uniform"), facts)
    for step in range(4):
        fed = rows if not step else [[3 + step], [4 + step]]
        a, b = feed(net, full, fed), feed(net, mine, fed)
        for row in range(2):
            assert torch.allclose(a[row], b[row], atol=1e-12)
            assert [store.length for store in mine.of_row(row)[0].stores] == [len(rows[row]) + step] * 2
    assert mine.snapshot()["seen"] == full.snapshot()["seen"] and mine.peaks == full.peaks


def test_a_prompt_within_its_budget_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, facts = model("llama")
    facts.words = WORDS
    fed: list[int] = []
    handle = net.register_forward_pre_hook(
        lambda m, args, words: fed.append(words["input_ids"].numel()), with_kwargs=True
    )
    rows = [tiny.tokens(12, seed=1), tiny.tokens(30, seed=2)]
    zipped("llama", rows, max_capacity_prompt=12)
    handle.remove()
    assert fed == [42, 11 + 1 + 30], "the second prompt alone"


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_question_comes_after_the_repetition_and_the_cut(chunk: int | None) -> None:
    """The context is zipped as a prompt of its own; the question is read whole and counts for nothing."""
    net, facts = model("llama")
    facts.words = WORDS
    stock, rows = Double("llama"), [tiny.tokens(40, seed=1), tiny.tokens(25, seed=2)]
    compression = tiny.compression(method="kvzip", n_sink=SINKS, max_capacity_prompt=8, chunk_size=16)
    cache = prefill_before_question(net, lambda: make_cache(compression, facts, chunk), rows, [6, 4])
    for i, (row, tail) in enumerate(zip(rows, (6, 4), strict=True)):
        context, n = row[:-tail], len(row)
        expected = best_of_all(scores(stock, context, 16), 8)
        asked = set(range(n - tail, n - 1))
        assert held(cache, i) == [[head | asked for head in layer] for layer in expected]


def test_cuts_that_go_on_read_what_is_new_again_and_keep_the_scores_of_the_rest() -> None:
    """Every 6 tokens: as many and those before them in one repetition, over what is still held."""
    net, facts = model("llama")
    facts.words = WORDS
    row = tiny.tokens(38, seed=4)
    settings = {"method": "kvzip", "n_sink": SINKS, "max_capacity_prompt": 8, "compress_every": 6}
    cache = make_cache(tiny.compression(**settings), facts)
    feed(net, cache, [row[:20]])
    segment, before = cache.segments[0], None
    known = [[dict(zip(h, m, strict=True)) for h, m in layer] for layer in scored(segment)]
    for t in range(20, 38):
        if (t - 19) % 6 == 0:
            before = cache.select([0])
        feed(net, cache, [[row[t]]])
        if before is None:
            continue
        again = WORDS.encode(LATER) + row[t - 13 : t - 5] + WORDS.encode("\n") + row[t - 5 : t + 1]
        attention = over_what_is_held(net, before, row[t], again, t - 5)
        for layer, heads in enumerate(known):
            for h, own in enumerate(heads):
                own.update({p: attention[layer][h][p] for p in range(t - 5, t + 1)})
        ranked = [[{p: float("inf") if p < SINKS else s for p, s in own.items()} for own in layer] for layer in known]
        stays = best_of_all(ranked, 8)
        assert held(cache, 0) == stays
        known = [
            [{p: s for p, s in own.items() if p in stays[i][h]} for h, own in enumerate(layer)]
            for i, layer in enumerate(known)
        ]
        before = None


def scored(segment: Any) -> list[list[tuple[list[int], list[float]]]]:
    """By layer and head, positions and scores of what is held."""
    found = []
    for store in segment.stores:
        pos, mass = store.pos[0].expand(store.mass.shape[1], -1), store.mass[0]
        found.append([(p[p >= 0].tolist(), m[p >= 0].tolist()) for p, m in zip(pos, mass, strict=True)])
    return found


def over_what_is_held(net: Any, cache: CompressedCache, token: int, again: list[int], first: int) -> Any:
    """Strongest attention to the tokens from `first` on: a forward of the token and the repetition over the cache, by a
    cache that notes queries and keys, a softmax over sinks, part and repetition."""
    segment, found = cache.segments[0], []
    n = segment.seen[0]
    steps: dict[int, Any] = {}
    original = segment.attend
    segment.mode = "hold"
    segment.attend = lambda step: (steps.__setitem__(step.layer, step), original(step))[1]
    feed(net, cache, [[token]])
    ends = {layer: len(store.pos[0, 0]) for layer, store in enumerate(segment.stores)}
    feed(net, cache, [again])
    for layer, store in enumerate(segment.stores):
        step, heads = steps[layer], []
        assert step.tokens == len(again)
        for h in range(store.keys.shape[1]):
            pos = store.pos[0, h if store.pos.shape[1] > 1 else 0].tolist()
            own: dict[int, float] = {p: 0.0 for p in range(first, n + 1)}
            group = step.query.shape[1] // store.keys.shape[1]
            logits = step.query[0, h * group : (h + 1) * group] @ store.keys[0, h].T * step.scaling
            for q in range(len(again)):
                seen = [i for i, p in enumerate(pos) if i < ends[layer] and (0 <= p < SINKS or p >= first)]
                seen += range(ends[layer], ends[layer] + q + 1)
                for weights in logits[:, q, seen].softmax(-1).tolist():
                    for i, w in zip(seen, weights, strict=True):
                        if i < ends[layer] and pos[i] >= first:
                            own[pos[i]] = max(own[pos[i]], w)
            heads.append(own)
        found.append(heads)
    return found


def test_all_kinds_of_requests_are_served() -> None:
    net, facts = model("gpt_neox")
    facts.words = WORDS
    compression = tiny.compression(method="kvzip", max_capacity_prompt=8, chunk_size=16)
    rows = [tiny.tokens(30, seed=1), tiny.tokens(17, seed=2)]

    def new_cache() -> CompressedCache:
        return make_cache(compression, facts)

    with torch.no_grad():
        cache, ids, mask, _ = start(net, new_cache, rows, None, 0)
        words = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        out = net.generate(ids, attention_mask=mask, **words, **generate_with(cache), **by_rows(cache))
        assert out.shape == (2, 35)
        assert [sum(layer[b] for layer in cache.held) for b in range(2)] == [2 * (8 + 4)] * 2
        with pytest.raises(UserError, match="method=kvzip reads the prompt a second time"):
            by_rows(new_cache(), beams=2)
        found, _ = score_continuations(net, new_cache, rows, [[[3, 4], [5]], [[6], [7]]], 1)
        assert [len(group) for group in found] == [2, 2]
        scored, cache = score_documents(net, new_cache, [tiny.tokens(60, seed=3), tiny.tokens(41)], Stream(1, 16))
        assert [len(one.log_probs) for one in scored] == [60, 41] and scored[0].evictions
        assert all(sum(layer[0] for layer in cache.held) <= 2 * (8 + 16) for _ in "1")


def test_what_it_cannot_be_used_for_is_said_before_or_at_once() -> None:
    pair = tiny.pair("gpt2")
    with pytest.raises(UserError, match="takes 616 positions, and the model has 512") as caught:
        feed(pair.model, pair.cache(method="kvzip", max_capacity_prompt=8), [tiny.tokens(302)])
    assert "\n" not in str(caught.value)
    net = tiny.build("llama")
    facts = wrap(net, tiny.compression(method="full"))
    with pytest.raises(UserError, match="needs a tokenizer"):
        prefill(net, lambda: make_cache(tiny.compression(method="kvzip", max_capacity_prompt=8), facts), [[3] * 20])
    for settings, words in (({"chunk_size": 0}, "repeats nothing"), ({"n_sink": -1}, "is negative")):
        with pytest.raises(UserError, match=words):
            tiny.compression(method="kvzip", max_capacity_prompt=8, **settings)


class Chatty:
    chat_template = "x"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + list(map(ord, text))

    def apply_chat_template(self, said: list[dict[str, str]], **words: object) -> str:
        assert words == {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        return f"<s>user {said[0]['content']}</s>\n<s>bot "


def test_the_chat_format_is_what_the_tokenizers_template_puts_around_a_message() -> None:
    words = words_of(Chatty())
    assert "".join(map(chr, words.head)) == "<s>user " and "".join(map(chr, words.tail)) == "</s>\n<s>bot "
    assert words.encode("\n") == [10]
    plain = Chatty()
    plain.chat_template = None  # type: ignore[assignment]
    assert not words_of(plain).head and not words_of(plain).tail


# --- KVzip+ ---------------------------------------------------------------------------------------------------------


def lengths_of(stock: Stock, name: str) -> Any:
    """|W_o v_j| / |h_i|, from what the stock model's attention modules are given and made of."""

    @functools.cache
    def found(text: tuple[int, ...]) -> list[tuple[Any, Any]]:
        out: list[tuple[Any, Any]] = []

        def note(module: Any, args: Any, words: dict[str, Any]) -> None:
            hidden = (args[0] if args else words["hidden_states"])[0]
            d = 8
            if name == "llama":
                values, matrix = module.v_proj(hidden).view(len(text), -1, d), module.o_proj.weight
            else:
                values = module.query_key_value(hidden).view(len(text), -1, 3 * d)[..., 2 * d :]
                matrix = module.dense.weight
            heads = [
                torch.stack([matrix[:, h * d : (h + 1) * d] @ v for v in values[:, h // stock.group]])
                for h in range(stock.heads)
            ]
            out.append(([head.norm(dim=1).tolist() for head in heads], hidden.norm(dim=1).tolist()))

        modules = [
            m for m in stock.model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")
        ]
        handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
        with torch.inference_mode():
            stock.model(input_ids=torch.tensor([text]), use_cache=False)
        for handle in handles:
            handle.remove()
        return out

    def plus(text: list[int], layer: int, head: int, query: int, key: int) -> float:
        values, hidden = found(tuple(text))[layer]
        return values[head][key] / hidden[query]

    return plus


@pytest.mark.parametrize("name", MODELS)
def test_plus_weighs_attention_by_what_the_value_adds_to_the_hidden_state(name: str) -> None:
    net = tiny.build(name)
    facts = tiny.wrap(net, tiny.compression(method="kvzip", plus=True, max_capacity_prompt=9))
    net, stock = net.double(), Double(name)
    rows = [tiny.tokens(n, seed=n) for n in (30, 19, 12)]
    compression = tiny.compression(method="kvzip", n_sink=SINKS, plus=True, max_capacity_prompt=6, chunk_size=14)
    cache, _ = prefill(net, lambda: make_cache(compression, facts), rows)
    differs = False
    for i, row in enumerate(rows):
        expected = best_of_all(scores(stock, row, 14, plus=lengths_of(stock, name)), 6)
        assert held(cache, i) == expected
        differs = differs or expected != best_of_all(scores(stock, row, 14), 6)
    assert differs, "or it would be kvzip"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plus_in_half_precision_keeps_nearly_the_same(dtype: torch.dtype) -> None:
    rows, kept = [tiny.tokens(40, seed=1), tiny.tokens(24, seed=2)], []
    for kind in (torch.float32, dtype):
        net = tiny.build("llama").to(kind)
        facts = tiny.wrap(net, tiny.compression(method="kvzip", plus=True, max_capacity_prompt=9))
        compression = tiny.compression(method="kvzip", plus=True, max_capacity_prompt=9)
        cache, logits = prefill(net, lambda c=compression, f=facts: make_cache(c, f), rows)
        assert all(own.isfinite().all() for own in logits.values())
        kept.append({(b, i, h, t) for b in range(2) for i in range(2) for h in range(2) for t in held(cache, b)[i][h]})
    assert len(kept[0] & kept[1]) > 0.8 * len(kept[0])

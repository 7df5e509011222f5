"""Budgets that scores fill: the slots of all layers ranked together (layer_budget=global), and thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.test_kept_sets import Stock, held_by

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.prefill import feed
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import evicted
from kv_lm_eval.methods.budget import Layers

MODELS = ("llama", "gpt_neox")
LENGTHS = (50, 33, 9)
GLOBAL = {"layer_budget": "global"}
Scores = list[list[dict[int, float]]]  # by layer and KV head, of each position; inf: always kept


def key_norms(stock: Stock, row: list[int], recent: int = 0) -> Scores:
    """knorm's scores, from the stock model's keys."""
    new = range(len(row) - recent, len(row))
    return [
        [{t: math.inf if t in new else -math.hypot(*key) for t, key in enumerate(head)} for head in layer]
        for layer in stock.keys(row)
    ]


def votes(stock: Stock, row: list[int], window: int) -> Scores:
    """snapkv's with kernel_size=1, from the stock model's eager attention."""
    n, found = len(row), []
    for weights in stock.attentions(row):
        found.append([])
        for head in range(stock.kv_heads):
            group = range(head * stock.group, (head + 1) * stock.group)
            sums = {t: sum(weights[h][q][t] for h in group for q in range(n - window, n)) for t in range(n)}
            found[-1].append({t: math.inf if t >= n - window else s for t, s in sums.items()})
    return found


def best_of_all(scores: Scores, mean: int, skipped: tuple[int, ...] = ()) -> list[list[set[int]]]:
    """The slots that stay: so many a head on average, the best of all layers and heads; lower layers, heads and
    positions first where they are equal."""
    places = [
        (-s, layer, head, t)
        for layer, heads in enumerate(scores)
        for head, own in enumerate(heads)
        for t, s in own.items()
        if layer not in skipped
    ]
    heads = sum(len(layer) for i, layer in enumerate(scores) if i not in skipped)
    stays = {place[1:] for place in sorted(places)[: mean * heads]}
    return [
        [{t for t in own if i in skipped or (i, h, t) in stays} for h, own in enumerate(layer)]
        for i, layer in enumerate(scores)
    ]


def batch(name: str, **settings: object) -> tuple[CompressedCache, list[list[int]]]:
    pair, rows = tiny.pair(name), [tiny.tokens(n, seed=n) for n in LENGTHS]
    cache = pair.cache(**settings)
    tiny.forward(pair.model, cache, rows)
    return cache, rows


def held(cache: CompressedCache, row: int) -> list[list[set[int]]]:
    heads = cache.stores[0].keys.shape[1]
    return [layer * heads if len(layer) == 1 else layer for layer in held_by(cache, row)]


CASES: dict[str, tuple[dict[str, object], Callable[[Stock, list[int]], Scores]]] = {
    "knorm": ({"method": "knorm", "recent_protected": 3}, lambda stock, row: key_norms(stock, row, 3)),
    "snapkv": (
        {"method": "snapkv", "window_size": 4, "kernel_size": 1},
        lambda stock, row: votes(stock, row, 4),
    ),
}


@pytest.mark.parametrize("budget", [5, 12, 40])
@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_the_best_slots_of_all_layers_and_heads_together_stay(name: str, method: str, budget: int) -> None:
    settings, scores = CASES[method]
    stock = Stock(name)
    cache, rows = batch(name, max_capacity_prompt=budget, **GLOBAL, **settings)
    uneven = False
    for i, row in enumerate(rows):
        expected = best_of_all(scores(stock, row), budget)
        assert held(cache, i) == expected, f"row of {len(row)} tokens"
        sizes = [len(head) for layer in expected for head in layer]
        assert sum(sizes) == min(budget, len(row)) * len(sizes)
        uneven = uneven or len({sum(map(len, layer)) for layer in expected}) > 1
        assert [cache.held[layer][i] for layer in range(2)] == [sum(map(len, layer)) / len(layer) for layer in expected]
    assert uneven, "or it would be no other budget than each layer's own"
    per_slot = 2 * cache.stores[0].keys.shape[3] * 4
    kept = [sum(len(h) for layer in held(cache, i) for h in layer) for i in range(len(rows))]
    assert cache.snapshot()["kv_bytes_valid"] == pytest.approx([n * per_slot for n in kept])


def test_skipped_layers_stay_whole_and_share_nothing() -> None:
    cache, rows = batch("llama", method="knorm", max_capacity_prompt=7, skip_layers="1", **GLOBAL)
    for i, row in enumerate(rows):
        assert held(cache, i) == best_of_all(key_norms(Stock("llama"), row), 7, skipped=(1,))


@given(st.lists(st.lists(st.integers(-2, 2), min_size=8, max_size=8), min_size=4, max_size=4), st.integers(0, 9))
@settings(derandomize=True, deadline=None, database=None)
def test_of_equal_scores_the_lower_layer_head_and_position_stays(numbers: list[list[int]], keep: int) -> None:
    pos = torch.tensor([-1, -1, *range(6)]).view(1, 1, 8)  # two empty slots, whatever they score
    scores = [torch.tensor(numbers[:2])[None].float(), torch.tensor(numbers[2:])[None].float()]
    counts = Layers("global").split(scores, [pos, pos], [keep])
    by_place = [[{t: float(s) for t, s in enumerate(head[2:])} for head in numbers[i : i + 2]] for i in (0, 2)]
    expected = best_of_all(by_place, keep)
    assert [c[0].tolist() for c in counts] == [[len(head) for head in layer] for layer in expected]


def test_a_layer_waits_for_the_last_one_and_the_peak_says_so() -> None:
    """What is cut layer by layer leaves one whole at most; here all of them are, until the last has attended."""
    pair, row = tiny.pair("llama"), tiny.tokens(40)
    whole = []
    for shares in ({}, GLOBAL):
        cache = pair.cache(method="knorm", max_capacity_prompt=8, **shares)
        segment = cache.segments[0]
        after, found = segment._after_attention, []
        segment._after_attention = lambda step, s=segment, after=after, found=found: (
            after(step),
            found.append([0 if store.is_empty else store.length for store in s.stores]),
        )
        tiny.forward(pair.model, cache, [row])
        whole.append(found)
        assert cache.peaks == [40] == cache.snapshot()["peak_slots"]
    assert whole[0] == [[8, 0], [8, 8]]
    assert whole[1][0] == [40, 0] and max(whole[1][1]) < 40


@pytest.mark.parametrize("settings", [GLOBAL, {"threshold": -3.2, "threshold_recent": 3}])
def test_no_layer_ever_holds_more_than_is_declared(settings: dict[str, object]) -> None:
    pair, row = tiny.pair("llama"), tiny.tokens(60)
    budget = {} if "threshold" in settings else {"max_capacity_prompt": 10}
    for every, prompt in ((0, 30), (3, 30), (3, 4)):
        words = {"method": "knorm", "compress_every": every, **budget, **settings}
        cache = pair.cache(**words)
        tiny.forward(pair.model, cache, [row[:prompt]])
        most = max(max(layer) for layer in cache.held)
        for t in range(prompt, 50):
            tiny.forward(pair.model, cache, [[row[t]]], [t])
            most = max(most, max(max(layer) for layer in cache.held))
        declared = tiny.compression(**words).peak_slots(prompt, 50 - prompt, pair.facts.cut_layers)
        assert most <= cache.peaks[0] <= declared
        if every and budget:
            assert sum(layer[0] for layer in cache.held) / 2 <= 10 + every


@pytest.mark.parametrize("name", MODELS)
def test_cuts_go_on_while_an_answer_is_written(name: str) -> None:
    """Every third token, of what all layers hold then, by the attention of a stock model that is blind to the rest."""
    pair, stock, row, window = tiny.pair(name), Stock(name), tiny.tokens(44, seed=3), 1
    last = {"method": "snapkv", "window_size": window, "kernel_size": 1}
    cache = pair.cache(max_capacity_prompt=9, compress_every=3, **last, **GLOBAL)
    tiny.forward(pair.model, cache, [row[:35]])
    left = best_of_all(votes(stock, row[:35], window), 9)
    stock.visible = [[[set(range(q)) for q in range(35)] for _ in range(stock.heads)] for _ in range(stock.layers)]
    for t in range(35, 44):
        for layer, heads in enumerate(left):
            for h in range(stock.heads):
                stock.visible[layer][h].append(heads[h // stock.group])
        tiny.forward(pair.model, cache, [[row[t]]], [t])
        left = [[head | {t} for head in layer] for layer in left]
        if (t - 34) % 3 == 0:
            scores = votes(stock, row[: t + 1], window)
            own = [[{p: scores[i][h][p] for p in head} for h, head in enumerate(layer)] for i, layer in enumerate(left)]
            left = best_of_all(own, 9)
        assert held(cache, 0) == left


@pytest.mark.parametrize("treatment", evicted.available())
def test_what_goes_may_be_treated_in_any_way(treatment: str) -> None:
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in (60, 26)]
    some = {"block_size": 9} if treatment == "compensate" else {}
    for budget in ({"max_capacity_prompt": 6, **GLOBAL}, {"threshold": 0.3, "threshold_recent": 2}):
        settings = {**CASES["snapkv"][0], "evicted": treatment, **some, **budget}
        for nbits in ({}, {"nbits": 4, "residual_length": 4, "group_size": 4}):
            cache = pair.cache(**settings, **nbits)
            tiny.forward(pair.model, cache, rows)
            for step in range(3):
                logits = tiny.forward(pair.model, cache, [[5 + step]] * 2, [60 + step, 26 + step])
                assert logits.isfinite().all()
            if "threshold" not in budget:
                for b in range(2):
                    assert sum(layer[b] for layer in cache.held) == 2 * (6 + 3)


# --- threshold ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recent", [0, 6, 128])
@pytest.mark.parametrize("name", MODELS)
def test_what_scores_lower_than_the_threshold_goes_but_for_the_newest(name: str, recent: int) -> None:
    stock, threshold = Stock(name), -3.1
    cache, rows = batch(name, method="knorm", threshold=threshold, threshold_recent=recent)
    kept = []
    for i, row in enumerate(rows):
        new = set(range(max(0, len(row) - recent), len(row)))
        expected = [
            [{t for t, s in head.items() if s >= threshold or t in new} for head in layer]
            for layer in key_norms(stock, row)
        ]
        assert held(cache, i) == expected
        kept.append(sum(len(h) for layer in expected for h in layer))
    sizes = cache.snapshot()
    per_slot = 2 * cache.stores[0].keys.shape[3] * 4
    assert sizes["kv_bytes_valid"] == pytest.approx([n * per_slot for n in kept]), "of each prompt its own"
    heads = 2 * cache.stores[0].keys.shape[1]
    assert sizes["kept_fraction"] == pytest.approx([n / heads / len(r) for n, r in zip(kept, rows, strict=True)])
    assert len(set(sizes["kept_fraction"])) > (recent < 128)


def test_a_score_equal_to_the_threshold_stays() -> None:
    compression = tiny.compression(method="knorm", threshold=2, threshold_recent=1)
    scores, pos = torch.tensor([[[1.0, 2.0, 3.0, 2.0, 0.0]]]), torch.tensor([[[-1, 0, 1, 2, 3]]])
    scores = compression.budget.adjusted(scores, pos, [4])
    counts = compression.counts(scores, pos, [4.0], [4], [4.0], 0)
    index, valid = evicted.choose(scores, pos, counts)
    assert counts.tolist() == [[4]] and pos[0, 0, index[0, 0]].tolist() == [0, 1, 2, 3] and valid.all()
    assert compression.counts(compression.budget.adjusted(scores - 1, pos, [4]), pos, [4.0], [4], [4.0], 0) == 2


def test_tokens_lose_their_protection_as_they_age() -> None:
    pair, row = tiny.pair("llama"), tiny.tokens(40, seed=1)
    cache = pair.cache(method="knorm", threshold=-2.5, threshold_recent=4, compress_every=5)
    tiny.forward(pair.model, cache, [row[:20]])
    for t in range(20, 40):
        before = held(cache, 0)
        tiny.forward(pair.model, cache, [[row[t]]], [t])
        if (t - 19) % 5:
            assert held(cache, 0) == [[head | {t} for head in layer] for layer in before]
            continue
        for layer, heads in enumerate(held(cache, 0)):
            store = cache.stores[layer]
            for h, head in enumerate(heads):
                assert head <= before[layer][h] | {t} and head >= set(range(t - 3, t + 1))
                norms = store.keys[0, h].norm(dim=-1)[store.pos[0, h] >= 0].tolist()
                old = [norm for p, norm in zip(sorted(head), norms, strict=True) if p <= t - 4]
                assert all(norm <= 2.5 for norm in old)


def test_a_document_says_what_its_cuts_were() -> None:
    pair, row = tiny.pair("llama"), tiny.tokens(60, seed=1)
    for budget in ({"threshold": -2.5, "threshold_recent": 4}, {"max_capacity_prompt": 9, **GLOBAL}):
        cache = pair.cache(method="knorm", **budget)
        (one,), cache = score_documents(pair.model, lambda c=cache: c, [row], Stream(1, 7))
        assert len(one.slots) == 60 and int(one.slots.max()) <= ceil_of(cache.peaks) and one.evictions
        assert all(fed % 7 == 0 and dropped >= 1 for fed, dropped in one.evictions)
        stepwise = pair.cache(method="knorm", compress_every=7, **budget)
        stepwise.mode = "decode"
        slots = []
        for token in [1, *row[:-1]]:
            slots.append(ceil_of(max(layer) for layer in stepwise.held) + 1 if stepwise.batch else 1)
            feed(pair.model, stepwise, [[token]])
        assert one.slots.tolist() == slots


def ceil_of(numbers: object) -> int:
    return math.ceil(max(numbers))  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "snapkv", "threshold": 0.1, "layer_budget": "pyramid"}, "pyramid shares out a number of slots"),
        ({"method": "snapkv", "threshold": 0.1, "layer_budget": "global"}, "global shares out a number of slots"),
        ({"method": "snapkv", "threshold": 0.1, "head_budget": "ada"}, "head_budget=ada shares out a number of slots"),
        ({"method": "adakv", "max_capacity_prompt": 64, **GLOBAL}, "add head_budget=uniform"),
        ({"method": "streaming_llm", "max_capacity_prompt": 64, **GLOBAL}, "goes by positions"),
        ({"method": "window", "threshold": 3}, "goes by positions"),
        ({"method": "h2o", "threshold": 3}, "protects a share of its budget"),
        ({"method": "snapkv", "max_capacity_prompt": 64, "compress_every": 2, "trigger": "excess", **GLOBAL}, "clock"),
        ({"method": "knorm", "keep_ratio": 0.5, "prune_after": 9, **GLOBAL}, "which then differs between layers"),
        ({"method": "knorm", "threshold": 3, "prune_after": 9}, "prune_after=9 has no effect"),
        ({"method": "knorm", "threshold": 3, "keep_ratio": 0.5}, "got keep_ratio=0.5 and threshold=3"),
        ({"method": "knorm", "keep_ratio": 0.5, "threshold_recent": 3}, "threshold_recent=3 has no effect"),
        ({"method": "knorm", "threshold": 3, "threshold_recent": -3}, "threshold_recent=-3 is negative"),
        ({"method": "knorm", "threshold": "nan"}, "must be a finite number"),
        ({"method": "head_aware", "base_window": 64, **GLOBAL}, "layer_budget=global has no effect"),
        ({"method": "head_aware", "base_window": 64, "threshold": 3}, "threshold=3 has no effect"),
        ({"method": "l2_fixed", "threshold": 3}, "protects a share of its budget"),
    ],
)
def test_what_scores_that_decide_how_many_stay_cannot_go_with(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        tiny.compression(**settings)
    assert "\n" not in str(caught.value)

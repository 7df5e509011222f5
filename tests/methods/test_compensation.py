"""Compensation tokens, against plain loops over the definition, and the identities that follow from it."""

from __future__ import annotations

import math

import hypothesis
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.rotary import rotation
from methods.test_kept_sets import Stock

from kv_lm_eval.cache.attention import Step, window_attention
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View

WINDOW, KERNEL, CAPACITY, LENGTH = 5, 3, 18, 60
SNAPKV = {"method": "snapkv_comp", "window_size": WINDOW, "kernel_size": KERNEL, "max_capacity_prompt": CAPACITY}


def expected_pairs(
    name: str,
    row: list[int],
    size: int,
    weight: str = "attn",
    empty_block: str = "zero",
    key_space: str = "post_rope",
    gqa: str = "kv_head",
) -> list[list[tuple[list[float], list[float], float]]]:
    """Per KV head (or query head) of the first layer: (key, value, pairs it stands for), unordered."""
    stock, pair = Stock(name), tiny.pair(name)
    weights = stock.attentions(row)[0]
    full = pair.cache(method="full")
    tiny.forward(pair.model, full, [row])
    store, out = full.stores[0], []
    turn = [rotation(stock.model.config, p) for p in range(len(row))] if key_space == "pre_rope" else []
    for head in range(stock.kv_heads if gqa == "kv_head" else stock.heads):
        kv_head = head if gqa == "kv_head" else head // stock.group
        keys, values = store.keys[0, kv_head].double().tolist(), store.values[0, kv_head].double().tolist()
        old = range(len(row) - WINDOW)
        group = range(head * stock.group, (head + 1) * stock.group) if gqa == "kv_head" else [head]
        votes = [
            sum(weights[h][q][t] for h in group for q in range(len(row) - WINDOW, len(row))) / len(group) for t in old
        ]
        pooled = {t: max(votes[u] for u in range(t - 1, t + 2) if u in old) for t in old}
        if weight == "uniform":
            votes = [1.0] * len(old)
        blocks = [list(old)[i : i + size] for i in range(0, len(old), size)]
        room, ranked = CAPACITY - WINDOW, sorted(old, key=lambda t: (-pooled[t], t))
        if room > len(blocks) and empty_block == "drop":
            chosen = next(
                set(ranked[:m])
                for m in range(room, -1, -1)
                if m + sum(not set(block) <= set(ranked[:m]) for block in blocks) <= room
            )
            blocks = [block for block in blocks if not set(block) <= chosen]
        elif room > len(blocks):
            chosen = set(ranked[: room - len(blocks)])
        else:
            chosen = set()
            heavy = sorted(range(len(blocks)), key=lambda j: (-sum(votes[t] for t in blocks[j]), j))[:room]
            blocks = [blocks[j] for j in sorted(heavy)]
        pairs = [(keys[t], values[t], 1.0) for t in [*sorted(chosen), *range(len(row) - WINDOW, len(row))]]
        if turn:
            keys = [(turn[t].T @ torch.tensor(key).double()).tolist() for t, key in enumerate(keys)]
        for block in blocks:
            rest = [t for t in block if t not in chosen]
            total = sum(votes[t] for t in rest)
            zero = [0.0] * len(keys[0])
            key, value = (
                [sum(votes[t] * x[t][d] for t in rest) / total for d in range(len(zero))] if total else zero
                for x in (keys, values)
            )
            if turn and total:
                mean = round(sum(votes[t] * t for t in rest) / total)
                key = (turn[mean] @ torch.tensor(key).double()).tolist()
            pairs.append((key, value, float(len(rest))))
        out.append(pairs)
    return out


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("weight", ["attn", "uniform"])
@pytest.mark.parametrize("empty_block", ["zero", "drop"])
@pytest.mark.parametrize("length", [LENGTH, 22], ids=["", "short: blocks are wholly kept"])
@pytest.mark.parametrize("block_size", ["full", 100, 55, 20, 7, 5, 4, 3, 2, 1])
def test_kept_and_averaged_pairs_are_those_of_the_definition(name, block_size, length, empty_block, weight):
    pair, row = tiny.pair(name), tiny.tokens(length, seed=11)
    cache = pair.cache(**SNAPKV, block_size=block_size, empty_block=empty_block, weight=weight)
    tiny.forward(pair.model, cache, [row])
    store = cache.stores[0]
    size = LENGTH if block_size == "full" else block_size
    for head, pairs in enumerate(expected_pairs(name, row, size, weight, empty_block)):
        assert len(pairs) == CAPACITY == store.length
        expected = torch.tensor([k + v for k, v, _ in pairs])
        got = torch.cat([store.keys[0, head], store.values[0, head]], dim=-1)
        distance = torch.cdist(expected.float(), got)
        assert distance.min(1).values.max() <= 1e-5 and distance.min(0).values.max() <= 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("key_space", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("gqa", ["kv_head", "query_head"])
@pytest.mark.parametrize("block_size", ["full", 20, 7, 3])
def test_options_are_those_of_the_definition_in_a_padded_batch(name, block_size, gqa, key_space):
    pair, rows = tiny.pair(name), [tiny.tokens(n, seed=n) for n in (LENGTH, 37, 12)]
    cache = pair.cache(**SNAPKV, block_size=block_size, gqa=gqa, key_space=key_space, count_bias="log_n")
    tiny.forward(pair.model, cache, rows)
    store = cache.stores[0]
    for i, row in enumerate(rows):
        if len(row) <= CAPACITY:
            assert (store.bias[i] == 0).all(), "nothing was evicted"
            continue
        size = len(row) if block_size == "full" else block_size
        for head, pairs in enumerate(expected_pairs(name, row, size, key_space=key_space, gqa=gqa)):
            expected = torch.tensor([[*k, *v, n] for k, v, n in pairs])
            count = store.bias[i, head].exp().unsqueeze(-1)
            got = torch.cat([store.keys[i, head], store.values[i, head], count], dim=-1)
            distance = torch.cdist(expected.float(), got)
            assert distance.min(1).values.max() <= 2e-5 and distance.min(0).values.max() <= 2e-5


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(
    n=st.integers(8, 60), capacity=st.integers(7, 40), block=st.integers(1, 60), empty=st.sampled_from(["zero", "drop"])
)
def test_every_old_pair_is_represented_exactly_once_within_the_budget(n, capacity, block, empty):
    options = {"block_size": block, "empty_block": empty, "weight": "uniform", "count_bias": "log_n"}
    part = tiny.compression(**{**SNAPKV, "max_capacity_prompt": capacity}, **options)
    blocks = math.ceil((n - WINDOW) / block)
    values = torch.eye(n).view(1, 1, n, n)  # a value says whose it was
    scores = torch.rand(1, 1, n, generator=torch.Generator().manual_seed(n * capacity))
    scores[..., n - WINDOW :] = math.inf
    view = View(values, values, torch.arange(n).view(1, 1, n), [n], [capacity], 0, 1, None, lambda last: values)
    kept = part.evicted.cut(part.method, view, scores, torch.tensor([[min(n, capacity)]]))
    assert kept.keys.shape[2] == min(n, capacity)
    if capacity - WINDOW > blocks or n <= capacity:
        owners = (kept.bias.exp().unsqueeze(-1) * kept.values).sum((0, 1, 2))
        assert torch.allclose(owners, torch.ones(n), atol=1e-5)


def steps(cache: CompressedCache, key, value, softcap=None):
    """A function that runs the first layer's attention over random queries with the next pairs of key and value."""
    generator, done = torch.Generator().manual_seed(1), [0]

    def step(count: int, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        query = torch.randn(1, 4, count, 8, generator=generator)
        part = slice(done[0], done[0] + count)
        cache.mode, cache._fed = mode, None
        positions = torch.arange(part.start, part.stop)[None]
        new = Step(0, query, key[:, :, part], value[:, :, part], positions, 8**-0.5, None, softcap)
        out = cache.attend(new, None).transpose(1, 2)
        done[0] += count if mode != "score" else 0
        return query, out

    return step


def full_attention(query, key, value, softcap=None):
    """Weights and output of the last queries over all pairs, in float64."""
    q, n = query.shape[2], key.shape[2]
    key, value = (x.double().repeat_interleave(2, dim=1) for x in (key, value))
    logits = query.double() @ key.transpose(2, 3) * 8**-0.5
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    weights = logits.masked_fill(torch.ones(q, n).triu(n - q + 1).bool(), -math.inf).softmax(-1)
    return weights, weights @ value


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("weight", ["attn", "uniform"])
@pytest.mark.parametrize("empty_block", ["zero", "drop"])
def test_where_the_pairs_of_a_block_are_the_same_nothing_is_lost(softcap, weight, empty_block):
    n, block = 5 * 7 + WINDOW, 7
    generator = torch.Generator().manual_seed(2)
    key, value = (
        torch.cat(
            [
                torch.randn(1, 2, 5, 8, generator=generator).repeat_interleave(block, dim=2),
                torch.randn(1, 2, WINDOW + 8, 8, generator=generator),
            ],
            dim=2,
        )
        for _ in range(2)
    )
    cache = tiny.pair("llama").cache(
        **SNAPKV, block_size=block, weight=weight, empty_block=empty_block, count_bias="log_n"
    )
    step = steps(cache, key, value, softcap)
    step(n, "prefill")
    store = cache.stores[0]
    assert store.length == CAPACITY and (store.bias > 0).sum() >= 5
    seen = n
    for count, mode in ((1, "decode"), (4, "decode"), (3, "score"), (1, "score"), (3, "decode")):
        query, out = step(count, mode)
        seen += count
        weights, expected = full_attention(query, key[:, :, :seen], value[:, :, :seen], softcap)
        assert (out - expected).abs().max() <= 1e-6, (count, mode)
        seen -= count if mode == "score" else 0
    store.observe(query, torch.arange(seen - 3, seen)[None], 3)
    seen_by_window = window_attention(store, 3, Step(0, query, key, value, query, 8**-0.5, None, softcap)).flatten(
        1, 2
    )  # [B, H, last, N]
    together = 1 - seen_by_window[..., store.length - WINDOW - 8 :].sum(-1)
    assert torch.allclose(together, 1 - weights[..., n - WINDOW :].sum(-1).float(), atol=1e-5)


def test_accumulated_attention_counts_an_average_as_often_as_it_stands_for():
    key, value = (torch.cat([torch.ones(1, 2, 30, 8), torch.randn(1, 2, 10, 8)], dim=2) for _ in range(2))
    cache = tiny.pair("llama").cache(
        method="h2o", max_capacity_prompt=10, window_size=5, compress_every=50, evicted="compensate",
        block_size="full", count_bias="log_n"
    )  # fmt: skip
    step = steps(cache, key, value)
    step(35, "prefill")
    before = cache.stores[0].mass.sum(-1)
    query, out = step(5, "decode")
    weights, expected = full_attention(query, key, value)
    assert (out - expected).abs().max() <= 1e-6
    assert torch.allclose(cache.stores[0].mass.sum(-1), before + 5, atol=1e-4)
    received = cache.stores[0].mass[..., -5:]
    assert torch.allclose(received, weights.view(1, 2, 2, 5, 40)[..., 35:].sum(3).mean(2).float(), atol=1e-5)


def test_uniform_weights_and_log_n_are_razor_attentions_compensation_token():
    pair, row = tiny.pair("llama"), tiny.tokens(LENGTH, seed=14)
    cache, full = (
        pair.cache(**SNAPKV, block_size="full", weight="uniform", count_bias="log_n"),
        pair.cache(method="full"),
    )
    for c in (cache, full):
        tiny.forward(pair.model, c, [row])
    store, whole = cache.stores[0], full.stores[0]
    for head in range(2):
        token = int((store.bias[0, head] > 0).nonzero())
        kept = {p for i, p in enumerate(store.pos[0, head].tolist()) if i != token}
        gone = [t for t in range(LENGTH) if t not in kept]
        assert torch.allclose(store.bias[0, head, token].exp(), torch.tensor(float(len(gone))))
        assert torch.allclose(store.keys[0, head, token], whole.keys[0, head, gone].mean(0), atol=1e-6)
        assert torch.allclose(store.values[0, head, token], whole.values[0, head, gone].mean(0), atol=1e-6)


@pytest.mark.parametrize("key_space", ["post_rope", "pre_rope"])
def test_averages_of_averages_stand_for_all_their_pairs(key_space):
    pair, row = tiny.pair("llama"), tiny.tokens(LENGTH, seed=15)
    options = {"block_size": "full", "weight": "uniform", "count_bias": "log_n", "key_space": key_space}
    cache, full = pair.cache(**SNAPKV, **options, compress_every=4), pair.cache(method="full")
    tiny.forward(pair.model, full, [row])
    for start, end in ((0, 40), *((t, t + 1) for t in range(40, LENGTH))):
        tiny.forward(pair.model, cache, [row[start:end]], starts=[start])
    store, whole = cache.stores[0], full.stores[0]
    for head in range(2):
        counts = store.bias[0, head].exp()
        assert torch.allclose(counts.sum(), torch.tensor(float(LENGTH)))
        total = (counts.unsqueeze(-1) * store.values[0, head]).sum(0)
        assert torch.allclose(total, whole.values[0, head].sum(0), atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2"])
def test_keys_that_cannot_be_moved_are_refused_for_pre_rope(name):
    with pytest.raises(UserError, match="key_space=pre_rope on GPT2.*Use key_space=post_rope"):
        wrap(tiny.build(name), tiny.compression(**SNAPKV, key_space="pre_rope"))


def test_pre_rope_averages_do_not_shrink():
    pair, row = tiny.pair("llama"), [5] * 300  # one token: its keys differ by their rotation only (first layer)
    norms = {}
    for key_space in ("post_rope", "pre_rope"):
        cache = pair.cache(**SNAPKV, block_size="full", weight="uniform", count_bias="log_n", key_space=key_space)
        tiny.forward(pair.model, cache, [row])
        store = cache.stores[0]
        average = store.bias[0, 0] > 0
        norms[key_space] = (store.keys[0, 0, average].norm() / store.keys[0, 0, -1].norm()).item()
    assert math.isclose(norms["pre_rope"], 1, rel_tol=1e-4) and norms["post_rope"] < 0.9


def test_one_block_as_long_as_the_old_tokens_is_the_full_block():
    pair, row = tiny.pair("llama"), tiny.tokens(LENGTH, seed=12)
    caches = [pair.cache(**SNAPKV, block_size=size) for size in ("fullc", LENGTH - WINDOW, 4096)]
    logits = [tiny.forward(pair.model, c, [row]) for c in caches]
    after = [tiny.forward(pair.model, c, [[7]], starts=[LENGTH]) for c in caches]
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2]) and torch.equal(logits[0], logits[1])


def test_a_block_that_is_wholly_kept_is_a_pair_of_zeros_or_gives_its_slot_away():
    pair, row = tiny.pair("llama"), tiny.tokens(22, seed=13)
    zero, drop = (
        pair.cache(**{**SNAPKV, "max_capacity_prompt": 20}, block_size=3, empty_block=e) for e in ("zero", "drop")
    )
    for cache in (zero, drop):
        tiny.forward(pair.model, cache, [row])
        assert cache.stores[0].length == 20
    empty = [(c.stores[0].keys == 0).all(-1).sum().item() for c in (zero, drop)]
    assert empty[0] > 0 and empty[1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [1e-30, 1e-44, 0.0])
@pytest.mark.parametrize("options", [{}, {"count_bias": "log_n"}])
def test_averages_are_finite_in_half_precision(dtype, weight, options):
    compression = tiny.compression(**SNAPKV, block_size="full", **options)
    keys = torch.randn(1, 2, 40, 8).to(dtype)
    weights = torch.full((1, 2, 1, WINDOW, 40), weight)
    view = View(
        keys, keys, torch.arange(40).view(1, 1, 40), [40], [CAPACITY], 0, 2, None, lambda w: weights[..., :w, :]
    )
    kept = compression.evicted.cut(compression.method, view, compression.method.score(view), torch.tensor([[CAPACITY]]))
    assert kept.keys.isfinite().all() and kept.values.isfinite().all() and kept.keys.dtype == dtype
    assert kept.bias is None or not kept.bias.isnan().any()


def test_any_scorer_can_be_compensated_and_masses_add_up():
    pair = tiny.pair("llama")
    budget = {"max_capacity_prompt": 16, "evicted": "compensate", "block_size": 8}
    for settings in ({"method": "knorm", "weight": "uniform"}, {"method": "h2o", "compress_every": 2}):
        cache = pair.cache(**settings, **budget)
        tiny.forward(pair.model, cache, [tiny.tokens(40)])
        if settings["method"] == "h2o":
            mass = cache.stores[0].mass
            assert math.isclose(mass.sum().item(), 40 * 2, rel_tol=1e-4), "every query gives one unit to each KV head"
        for step in range(4):
            assert tiny.forward(pair.model, cache, [[5 + step]], starts=[40 + step]).isfinite().all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"method": "knorm", "evicted": "compensate"}, "knorm does not look at; use weight=uniform"),
        ({"method": "snapkv", "block_size": 32}, "block_size=32 has no effect with evicted=drop: it is a setting of"),
        ({"method": "snapkv", "evicted": "d2o", "key_space": "pre_rope"}, "key_space=pre_rope has no effect with"),
        ({"method": "snapkv_comp", "merge_size": 8}, "merge_size=8 has no effect .* evicted=cam"),
        ({"method": "snapkv_comp", "evicted": "drop", "count_bias": "log_n"}, "count_bias=log_n has no effect"),
        ({"method": "snapkv_comp", "count_bias": "n"}, "count_bias=n is not one of: none, log_n"),
        ({"method": "snapkv", "evicted": "camm"}, "evicted=camm is not one of: drop, cam, .*did you mean"),
        ({"method": "snapkv_comp", "block_size": 0}, "at least 1, or full"),
        ({"method": "snapkv_comp", "block_size": "half"}, "at least 1, or full"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        tiny.compression(**args, max_capacity_prompt=64)

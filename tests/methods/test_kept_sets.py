"""Which tokens each method keeps, against plain loops over the papers' definitions.

The loops see attention weights of the stock model's eager attention (`output_attentions=True`), never our code; where
tokens were evicted before, they are hidden from the stock model by a mask. Ties go to the older token.
"""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import transformers as tf

from kv_lm_eval.cache.cache import CompressedCache

MODELS = ("llama", "qwen3", "gpt_neox", "gpt2")  # full attention: every layer is cut


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def own_window(config: tf.PretrainedConfig, layer: int) -> int | None:
    """The sliding window that the architecture itself gives to a layer."""
    if config.model_type == "mistral":
        return config.sliding_window
    types = getattr(config, "layer_types", None)
    return config.sliding_window if types and types[layer] == "sliding_attention" else None


class Stock:
    """The stock model run on a growing sequence from which positions are hidden, layer by layer and head by head."""

    def __init__(self, name: str) -> None:
        self.model = tiny.build(name)
        self.model.set_attn_implementation("eager")
        config = self.model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", self.heads)
        self.group = self.heads // self.kv_heads
        self.visible: list[list[list[set[int]]]] = [[[] for _ in range(self.heads)] for _ in range(self.layers)]

    @torch.inference_mode()
    def attentions(self, row: list[int]) -> list[list[list[list[float]]]]:
        """Weights [layer][query head][query][key]; queries without an entry in `visible` see all that is not later."""
        n = len(row)
        handles = []
        for module in self.model.modules():
            if not (hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention")):
                continue
            hidden = torch.ones(n, n).triu(1).bool().repeat(1, self.heads, 1, 1)
            for head in range(self.heads):
                for query, stays in enumerate(self.visible[module.layer_idx][head]):
                    for key in range(query):
                        hidden[0, head, query, key] = key not in stays
            if (window := own_window(self.model.config, module.layer_idx)) is not None:
                hidden |= torch.arange(n)[:, None] - torch.arange(n)[None, :] >= window
            mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
                )
            )
        out = self.model(input_ids=torch.tensor([row]), use_cache=False, output_attentions=True)
        for handle in handles:
            handle.remove()
        return [a[0].double().tolist() for a in out.attentions]

    @torch.inference_mode()
    def keys(self, row: list[int]) -> list[list[list[list[float]]]]:
        """Cached keys [layer][KV head][position][dimension]."""
        cache = tf.DynamicCache(config=self.model.config)
        self.model(input_ids=torch.tensor([row]), **tiny.given(cache), use_cache=True)
        return [layer.keys[0].double().tolist() for layer in cache.layers]


def best(scores: dict[int, float], count: int) -> set[int]:
    """The `count` positions with the highest scores, the older one where they are equal."""
    return set(sorted(scores, key=lambda t: (-scores[t], t))[:count])


def ours(name: str, row: list[int], **settings: object) -> list[list[set[int]]]:
    pair = tiny.pair(name)
    cache = pair.cache(**settings)
    tiny.forward(pair.model, cache, [row])
    return held_by(cache)


def held_by(cache: CompressedCache, row: int = 0) -> list[list[set[int]]]:
    return [[set(head) for head in tiny.kept(cache, layer, row)] for layer in range(len(cache.stores))]


# --- SnapKV ---------------------------------------------------------------------------------------------------------


def snapkv(
    stock: Stock, row: list[int], window: int, kernel: int, pooling: str, capacity: int, first: int = 0
) -> list[list[set[int]]]:
    """Kept positions by layer and KV head; those before `first` vote and are voted for, but are not kept."""
    n = len(row)
    if n <= capacity:
        return [[set(range(n))] * stock.kv_heads for _ in range(stock.layers)]
    out = []
    for weights in stock.attentions(row):
        out.append([])
        for kv_head in range(stock.kv_heads):
            votes = []
            for t in range(n - window):
                total = 0.0
                for head in range(kv_head * stock.group, (kv_head + 1) * stock.group):
                    for query in range(n - window, n):
                        total += weights[head][query][t]
                votes.append(total / stock.group)
            pooled = {}
            for t in range(n - window):
                near = [votes[u] for u in range(t - kernel // 2, t + kernel // 2 + 1) if 0 <= u < n - window]
                pooled[t] = max(near) if pooling == "max" else sum(near) / kernel
            candidates = {t: p for t, p in pooled.items() if t >= first}
            out[-1].append(best(candidates, capacity - window) | set(range(n - window, n)))
    return out


@pytest.mark.parametrize("length", [17, 18, 19, 60])
@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_snapkv_keeps_what_the_last_queries_vote_for(name: str, pooling: str, length: int) -> None:
    row = tiny.tokens(length, seed=length)
    expected = snapkv(Stock(name), row, window=5, kernel=3, pooling=pooling, capacity=18)
    settings = {"window_size": 5, "kernel_size": 3, "pooling": pooling, "max_capacity_prompt": 18}
    got = ours(name, row, method="snapkv", **settings)
    assert got == (expected if length > 18 else [[set(range(length))]] * 2)


@pytest.mark.parametrize(("window", "kernel"), [(1, 1), (8, 7), (16, 5)])
def test_snapkv_windows_and_kernels(window: int, kernel: int) -> None:
    row = tiny.tokens(50, seed=1)
    expected = snapkv(Stock("llama"), row, window, kernel, "max", capacity=20)
    settings = {"window_size": window, "kernel_size": kernel, "max_capacity_prompt": 20}
    assert ours("llama", row, method="snapkv", **settings) == expected


@pytest.mark.parametrize("name", ["mistral_sliding", "gemma3", "gemma2"])
def test_snapkv_votes_are_those_of_the_layers_own_attention_with_its_window_and_softcap(name: str) -> None:
    row = tiny.tokens(50, seed=1)
    first = 50 - 23 if tiny.pair(name).facts.all_sliding else 0  # what no later query can see is no candidate
    expected = snapkv(Stock(name), row, window=8, kernel=3, pooling="avg", capacity=20, first=first)
    got = ours(name, row, method="snapkv", window_size=8, kernel_size=3, pooling="avg", max_capacity_prompt=20)
    for layer in range(2):
        if tiny.pair(name).facts.compressible(layer):
            assert got[layer] == expected[layer]
        else:
            assert got[layer] == [set(range(50))], "sliding layers are left to their own window"


# --- Knorm ----------------------------------------------------------------------------------------------------------


def test_knorm_keeps_the_keys_with_the_smallest_norms(name: str) -> None:
    row = tiny.tokens(50, seed=2)
    expected = [
        [best({t: -math.sqrt(sum(x * x for x in key)) for t, key in enumerate(head)}, 17) for head in layer]
        for layer in Stock(name).keys(row)
    ]
    assert ours(name, row, method="knorm", max_capacity_prompt=17) == expected


# --- H2O ------------------------------------------------------------------------------------------------------------


def test_h2o_once_keeps_recent_tokens_and_the_heaviest_of_the_others(name: str) -> None:
    row, n, capacity = tiny.tokens(50, seed=3), 50, 17
    expected, stock = [], Stock(name)
    for weights in stock.attentions(row):
        expected.append([])
        group = stock.group
        for first in range(0, len(weights), group):
            recent = set(range(n - capacity // 2, n))
            mass = {t: sum(weights[h][q][t] for h in range(first, first + group) for q in range(n)) for t in range(n)}
            old = {t: m for t, m in mass.items() if t not in recent}
            expected[-1].append(recent | best(old, capacity - len(recent)))
    assert ours(name, row, method="h2o", max_capacity_prompt=capacity, compress_every=0) == expected


@pytest.mark.parametrize("window", [0, 3, 16])
def test_h2o_window_size_sets_the_share_of_recent_tokens(window: int) -> None:
    got = ours("llama", tiny.tokens(50, seed=3), method="h2o", max_capacity_prompt=17, window_size=window)
    assert all(set(range(50 - window, 50)) <= head and len(head) == 17 for layer in got for head in layer)


@pytest.mark.parametrize("every", [1, 3])
def test_h2o_goes_on_accumulating_and_evicting_while_decoding(name: str, every: int) -> None:
    stock, n, capacity, steps = Stock(name), 30, 13, 9
    row = tiny.tokens(n + steps, seed=4)
    mass = [[[0.0] * (n + steps) for _ in range(stock.kv_heads)] for _ in range(stock.layers)]
    kept = [[set(range(n)) for _ in range(stock.kv_heads)] for _ in range(stock.layers)]
    pair = tiny.pair(name)
    cache = pair.cache(method="h2o", max_capacity_prompt=capacity, compress_every=every)
    for seen in range(n, n + steps + 1):
        fed = row[:n] if seen == n else row[seen - 1 : seen]
        tiny.forward(pair.model, cache, [fed], starts=[seen - len(fed)])
        queries = range(n) if seen == n else range(seen - 1, seen)
        for layer, weights in enumerate(stock.attentions(row[:seen])):
            for kv_head in range(stock.kv_heads):
                held = kept[layer][kv_head] | {seen - 1}
                for t in held:
                    for head in range(kv_head * stock.group, (kv_head + 1) * stock.group):
                        mass[layer][kv_head][t] += sum(weights[head][q][t] for q in queries) / stock.group
                if (seen - n) % every == 0 and len(held) > capacity:
                    recent = set(range(seen - capacity // 2, seen))
                    old = {t: mass[layer][kv_head][t] for t in held - recent}
                    held = recent | best(old, capacity - len(recent))
                kept[layer][kv_head] = held
        hide_from_later_queries(stock, kept, seen)
        assert held_by(cache) == kept, f"{seen} tokens seen"


def hide_from_later_queries(stock: Stock, kept: list[list[set[int]]], seen: int) -> None:
    """The next query, at position `seen`, sees what is kept now; earlier queries keep the view they had."""
    for layer in range(stock.layers):
        for head in range(stock.heads):
            views = stock.visible[layer][head]
            views += [set(range(query)) for query in range(len(views), seen)]
            views.append(set(kept[layer][head // stock.group if len(kept[layer]) > 1 else 0]))


# --- TOVA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 1, 3])
def test_tova_drops_what_the_last_query_of_all_heads_together_attends_to_least(name: str, every: int) -> None:
    stock, n, capacity, steps = Stock(name), 30, 13, 9
    row = tiny.tokens(n + steps, seed=5)
    kept = [[set(range(n))] for _ in range(stock.layers)]
    pair = tiny.pair(name)
    cache = pair.cache(method="tova", max_capacity_prompt=capacity, compress_every=every)
    for seen in range(n, n + steps + 1):
        fed = row[:n] if seen == n else row[seen - 1 : seen]
        tiny.forward(pair.model, cache, [fed], starts=[seen - len(fed)])
        for layer, weights in enumerate(stock.attentions(row[:seen])):
            held = kept[layer][0] | {seen - 1}
            if (seen == n or (every and (seen - n) % every == 0)) and len(held) > capacity:
                score = {t: sum(weights[head][seen - 1][t] for head in range(stock.heads)) / stock.heads for t in held}
                held = best(score, capacity)
            kept[layer] = [held]
        hide_from_later_queries(stock, kept, seen)
        assert held_by(cache) == kept, f"{seen} tokens seen"


# --- any method: chunks of a prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["snapkv", "knorm", "h2o", "tova"])
def test_a_prompt_held_in_chunks_and_cut_at_its_end_keeps_what_one_forward_keeps(name: str, method: str) -> None:
    row, pair = tiny.tokens(60, seed=9), tiny.pair(name)
    settings = {"method": method, "max_capacity_prompt": 20, **({"window_size": 8} if method == "snapkv" else {})}
    cache = pair.cache(**settings)
    for start in (0, 25, 50, 55):
        cache.mode = "hold" if start < 55 else "prefill"
        tiny.forward(pair.model, cache, [row[start : {0: 25, 25: 50, 50: 55, 55: 60}[start]]], starts=[start])
    assert held_by(cache) == ours(name, row, **settings)


# --- window, sinks, random ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4])
def test_windows_and_sinks_are_the_last_and_the_first_tokens_at_every_step(name: str, every: int) -> None:
    pair, n, steps = tiny.pair(name), 30, 9
    row = tiny.tokens(n + steps, seed=6)
    window = pair.cache(method="window", window_size=11, compress_every=every)
    sinks = pair.cache(method="streaming_llm", n_sink=3, window_size=8, positions="absolute", compress_every=every)
    for seen in range(n, n + steps + 1):
        fed = row[:n] if seen == n else row[seen - 1 : seen]
        for cache in (window, sinks):
            tiny.forward(pair.model, cache, [fed], starts=[seen - len(fed)])
        last_cut = seen - (seen - n) % every
        for layer in range(pair.facts.num_layers):
            assert tiny.kept(window, layer) == [list(range(last_cut - 11, seen))]
            assert tiny.kept(sinks, layer) == [[0, 1, 2, *range(last_cut - 8, seen)]]


def test_random_choice_depends_on_seed_layer_head_and_position_only() -> None:
    row, budget = tiny.tokens(60, seed=7), 20
    alone = ours("llama", row, method="random", max_capacity_prompt=budget)
    pair = tiny.pair("llama")
    cache = pair.cache(method="random", max_capacity_prompt=budget)
    tiny.forward(pair.model, cache, [tiny.tokens(80), tiny.tokens(7), row])
    in_a_batch = held_by(cache, row=2)
    other_text = ours("llama", tiny.tokens(60, seed=8), method="random", max_capacity_prompt=budget)
    other_seed = ours("llama", row, method="random", max_capacity_prompt=budget, seed=1)
    assert alone == in_a_batch == other_text
    heads = [frozenset(h) for layer in alone for h in layer] + [frozenset(h) for layer in other_seed for h in layer]
    assert len(set(heads)) == 8, "heads, layers and seeds choose differently"


def test_random_choice_has_no_preferred_positions() -> None:
    counts = [0] * 40
    for seed in range(200):
        for layer in ours("gpt2", tiny.tokens(40), method="random", max_capacity_prompt=10, seed=seed):
            for head in layer:
                for t in head:
                    counts[t] += 1
    # 1600 draws of a quarter each: mean 400, standard deviation 17
    assert min(counts) > 400 - 5 * 17 and max(counts) < 400 + 5 * 17

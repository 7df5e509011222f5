"""Attention received by the number of queries, against loops over kvpress's definition, in the prompt and after."""

from __future__ import annotations

import pytest
import tiny
from methods.plain import NAMES, Layer, choose, compare
from methods.test_kept_sets import Stock, best, held_by, hide_from_later_queries

CAPACITY = 13
OBSERVED = {"method": "observed_attention", "max_capacity_prompt": CAPACITY}


def reference(layer: Layer) -> list[set[int]]:
    out = []
    for head in layer.kv_heads:
        group, scores = layer.group(head), []
        for t in range(layer.n):
            by_head = [sum(layer.weights[h][q][t] for q in range(layer.n)) / (layer.n - t) for h in group]
            scores.append(sum(by_head) / len(group))
        out.append(choose(scores, CAPACITY))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_kept_tokens_are_those_of_kvpress_in_a_padded_batch(name):
    compare(name, OBSERVED, reference)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("every", [1, 3])
def test_means_go_on_over_the_queries_of_the_answer(name, every):
    stock, n, steps = Stock(name), 30, 7
    row = tiny.tokens(n + steps, seed=4)
    mass = [[[0.0] * (n + steps) for _ in range(stock.kv_heads)] for _ in range(stock.layers)]
    kept = [[set(range(n)) for _ in range(stock.kv_heads)] for _ in range(stock.layers)]
    pair = tiny.pair(name)
    cache = pair.cache(**OBSERVED, compress_every=every)
    for seen in range(n, n + steps + 1):
        fed = row[:n] if seen == n else row[seen - 1 : seen]
        tiny.forward(pair.model, cache, [fed], starts=[seen - len(fed)])
        queries = range(n) if seen == n else range(seen - 1, seen)
        for layer, weights in enumerate(stock.attentions(row[:seen])):
            for head in range(stock.kv_heads):
                held = kept[layer][head] | {seen - 1}
                for t in held:
                    for own in range(head * stock.group, (head + 1) * stock.group):
                        mass[layer][head][t] += sum(weights[own][q][t] for q in queries) / stock.group
                if (seen - n) % every == 0 and len(held) > CAPACITY:
                    held = best({t: mass[layer][head][t] / (seen - t) for t in held}, CAPACITY)
                kept[layer][head] = held
        hide_from_later_queries(stock, kept, seen)
        assert held_by(cache) == kept, f"{seen} tokens seen"

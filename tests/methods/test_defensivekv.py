"""DefensiveKV against plain loops in float64 over the authors' code, with the slots of a layer shared by its heads."""

from __future__ import annotations

import pytest
import tiny
import torch
from methods import plain
from methods.plain import NAMES, Layer, compare, pooled

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.defensivekv import levelled, summed_over_heads

CAPACITY, WINDOW = 16, 4
DEFENSIVE = {"method": "defensivekv", "max_capacity_prompt": CAPACITY, "window_size": WINDOW}


def scores(layer: Layer, window: int, kernel: int, pooling: str, mass: float, slots: int) -> list[list[float]]:
    """Of each head, for the tokens before the window."""
    old, queries = layer.n - window, range(layer.n - window, layer.n)
    norms = [[layer.projected(head, t) for t in range(old)] for head in layer.kv_heads]
    heads = [h for head in layer.kv_heads for h in layer.group(head)]
    near_window = [sum(layer.weights[h][q][max(0, old - window) : old]) for h in heads for q in queries]
    share = mass - sum(near_window) / len(near_window)
    out, firsts = [], list[set[int]]()
    for head in layer.kv_heads:
        worst, average = [0.0] * old, [0.0] * old
        for own in layer.group(head):
            for q in queries:
                given = layer.weights[own][q][:old]
                near = pooled(given, kernel, pooling)
                near = [x / sum(near) * sum(given) for x in near]
                worst = [max(w, x) for w, x in zip(worst, near, strict=True)]
                average = [a + x for a, x in zip(average, given, strict=True)]
        least = sum(worst) / old
        own = [max(w, least) * norms[head][t] / sum(n[t] for n in norms) for t, w in enumerate(worst)]
        total, first = 0.0, set[int]()
        for t in sorted(range(old), key=lambda t: (-average[t], t)):
            total += average[t] / sum(average)
            if total >= share:
                break
            first.add(t)
        out.append(own)
        firsts.append(set(sorted(first, key=lambda t: (-average[t], t))[: slots - window]))
    highest = max(s for own in out for s in own)
    return [[highest if t in f else s for t, s in enumerate(own)] for own, f in zip(out, firsts, strict=True)]


def reference(
    layer: Layer, window: int = WINDOW, kernel: int = 5, pooling: str = "avg", mass: float = 0.9, slots: int = CAPACITY
) -> list[set[int]]:
    if layer.n <= slots:
        return [set(range(layer.n)) for _ in layer.kv_heads]
    own = scores(layer, window, kernel, pooling, mass, slots)
    ranked = sorted((-s, head, t) for head, of_head in enumerate(own) for t, s in enumerate(of_head))
    chosen = ranked[: (slots - window) * len(own)]
    recent = set(range(layer.n - window, layer.n))
    return [{t for _, h, t in chosen if h == head} | recent for head in layer.kv_heads]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, {}),
        ({"first_stage_mass": 0}, {"mass": 0.0}),
        ({"first_stage_mass": 0.5}, {"mass": 0.5}),
        ({"kernel_size": 1, "pooling": "max"}, {"kernel": 1, "pooling": "max"}),
        ({"kernel_size": 7}, {"kernel": 7}),
        ({"window_size": 8}, {"window": 8}),
        ({"max_capacity_prompt": 22}, {"slots": 22}),
    ],
    ids=str,
)
def test_kept_tokens_are_those_of_the_authors_code_in_a_padded_batch(name, settings, words):
    compare(name, {**DEFENSIVE, **settings}, lambda layer: reference(layer, **words), (60, 41, 24, 14))


def test_the_settings_show():
    layers = [x for n in (60, 41) for x in plain.layers("gpt_neox", tuple(tiny.tokens(n, seed=n)))]
    variants = [{}, {"mass": 0.0}, {"mass": 0.5}, {"kernel": 1}, {"kernel": 7}, {"pooling": "max"}, {"window": 8}]
    assert len({str([[sorted(h) for h in reference(x, **v)] for x in layers]) for v in variants}) == len(variants)


def test_it_goes_with_pyramids_later_cuts_and_treatments_of_the_rest():
    pair, lengths = tiny.pair("llama"), (60, 41, 24)
    for more in (
        {"layer_budget": "pyramid"},
        {"compress_every": 3},
        {"compress_every": 3, "evicted": "compensate", "block_size": 5},
        {"head_budget": "uniform"},
        {"gqa": "query_head"},
        {"alpha": 0.5},
    ):
        cache = pair.cache(**DEFENSIVE, **more)
        tiny.forward(pair.model, cache, [tiny.tokens(n, seed=n) for n in lengths])
        for t in range(7):
            logits = tiny.forward(pair.model, cache, [[3 + t]] * 3, starts=[n + t for n in lengths])
            assert logits.isfinite().all()
        left = 7 % more.get("compress_every", 8)
        assert [sum(held[row] for held in cache.held) / 2 for row in range(3)] == [CAPACITY + left] * 3, more


def test_at_later_cuts_a_token_is_shared_by_the_heads_that_still_hold_it():
    pos = torch.tensor([[[-1, 0, 3, 7, 9], [0, 2, 3, 8, 9], [-1, -1, 1, 3, 8]]])
    numbers = torch.arange(1.0, 16).view(1, 3, 5)
    numbers[pos < 0] = float("nan")  # what is empty holds anything
    got = summed_over_heads(numbers, pos)
    for head in range(3):
        for slot, t in enumerate(pos[0, head].tolist()):
            holds = [numbers[0, h, s].item() for h in range(3) for s in range(5) if pos[0, h, s] == t >= 0]
            assert t < 0 or got[0, head, slot] == sum(holds)
    alike = summed_over_heads(torch.ones(1, 3, 2), torch.tensor([[[0, 1]]]))
    assert alike.tolist() == [[[3.0, 3.0]]]


def test_scores_that_differ_by_rounding_are_the_same_and_others_stay_as_they_are():
    scores = torch.tensor([[[0.0, 3.0, 1.0, 1.0 + 2e-7, 0.0, 1.0 - 1e-7, 1.001, 2.0]]])
    got = levelled(scores)[0, 0]
    assert got[2] == got[3] == got[5] == scores[0, 0, 5]
    assert got[[0, 1, 4, 6, 7]].tolist() == scores[0, 0, [0, 1, 4, 6, 7]].tolist()


def test_heads_share_without_a_safeguard_unless_it_is_given():
    found = tiny.compression(method="defensivekv", max_capacity_prompt=64)
    assert found.heads.differ and found.heads.alpha == 0
    assert (found.method.window_size, found.method.kernel_size, found.method.pooling) == (32, 5, "avg")


@pytest.mark.parametrize("setting", [{"first_stage_mass": 1.1}, {"kernel_size": 4}])
def test_settings_without_sense_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        tiny.compression(**{**DEFENSIVE, **setting})

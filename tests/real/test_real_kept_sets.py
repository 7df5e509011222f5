"""On real weights: what each method keeps, against the suite's plain loops over the papers' definitions.

The loops see the stock model's own eager attention and its cached keys. A tie within rounding may go either way: the
loops sum in float64 what both sides have in float32.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator

import pytest
import real_models as real
import test_expected_attention as expecting
import test_kept_sets as loops
import tiny
import torch

LENGTH, CAPACITY, WINDOW = 90, 30, 8
Scores = list[list[dict[int, float]]]  # of a layer and KV head: what competes, by position
TIES = 1e-4  # relative: what rounding may turn round


@pytest.fixture(scope="module", params=real.NAMES)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """The helpers for tiny models, on a real one: `tiny.build` gives it, `tiny.tokens` its ids of ordinary text."""
    real.folder(request.param)
    built = functools.cache(lambda which: real.stock(request.param))
    first = iter(["wrapped"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "build", lambda name, **_: built(next(first, "stock")))
        patch.setattr(tiny, "tokens", lambda n, seed=0: real.tokens(request.param, n, start=100 * seed))
        patch.setattr(tiny, "pair", functools.cache(tiny.pair.__wrapped__))
        yield request.param
    built.cache_clear()
    gc.collect()


@functools.lru_cache(maxsize=1)
def attentions(name: str) -> list[torch.Tensor]:
    """Of each layer [query head, query, key], float64."""
    return [torch.tensor(a, dtype=torch.float64) for a in loops.Stock(name).attentions(tiny.tokens(LENGTH))]


def of_groups(name: str, score: Callable[[torch.Tensor], list[float]]) -> Scores:
    """`score` of the mean attention of each KV head's query heads [query, key]."""
    group = loops.Stock(name).group
    out = []
    for layer in attentions(name):
        heads = [layer[first : first + group].mean(0) for first in range(0, len(layer), group)]
        out.append([dict(enumerate(score(head))) for head in heads])
    return out


def snapkv(name: str) -> Scores:
    def pooled(weights: torch.Tensor) -> list[float]:
        votes = weights[-WINDOW:, : LENGTH - WINDOW].sum(0).tolist()
        return [max(votes[max(0, t - 3) : t + 4]) for t in range(LENGTH - WINDOW)]

    return of_groups(name, pooled)


def h2o(name: str) -> Scores:
    return of_groups(name, lambda weights: weights.sum(0).tolist()[: LENGTH - CAPACITY // 2])


def tova(name: str) -> Scores:
    return [[dict(enumerate(layer.mean(0)[-1].tolist()))] for layer in attentions(name)]


def knorm(name: str) -> Scores:
    keys = loops.Stock(name).keys(tiny.tokens(LENGTH))
    return [[{t: -(sum(x * x for x in key) ** 0.5) for t, key in enumerate(head)} for head in layer] for layer in keys]


def keydiff(name: str) -> Scores:
    """Minus the cosine to the mean of the normalised keys."""
    out = []
    for layer in loops.Stock(name).keys(tiny.tokens(LENGTH)):
        out.append([])
        for head in layer:
            keys = torch.tensor(head, dtype=torch.float64)
            units = keys / keys.norm(dim=-1, keepdim=True)
            mean = units.mean(0)
            out[-1].append(dict(enumerate((-(units @ mean) / mean.norm()).tolist())))
    return out


def windows(name: str) -> Scores:
    return [[{t: float(t) for t in range(LENGTH)}]] * loops.Stock(name).layers


def sinks(name: str) -> Scores:
    return [[{t: float(t if t >= 4 else LENGTH) for t in range(LENGTH)}]] * loops.Stock(name).layers


METHODS: dict[str, tuple[dict[str, object], Callable[[str], Scores]]] = {
    "snapkv": ({"max_capacity_prompt": CAPACITY, "window_size": WINDOW}, snapkv),
    "h2o": ({"max_capacity_prompt": CAPACITY, "compress_every": 0}, h2o),
    "tova": ({"max_capacity_prompt": CAPACITY}, tova),
    "knorm": ({"max_capacity_prompt": CAPACITY}, knorm),
    "keydiff": ({"max_capacity_prompt": CAPACITY}, keydiff),
    "window": ({"window_size": CAPACITY}, windows),
    "streaming_llm": ({"n_sink": 4, "window_size": CAPACITY - 4, "positions": "absolute"}, sinks),
}


@pytest.mark.parametrize("method", METHODS)
def test_kept_sets_are_those_of_the_plain_loops(name: str, method: str) -> None:
    settings, scores_of = METHODS[method]
    got = loops.ours(name, tiny.tokens(LENGTH), method=method, **settings)
    facts = tiny.pair(name).facts
    seen = 0
    for layer, heads in enumerate(scores_of(name)):
        if not facts.compressible(layer):
            assert got[layer] == [set(range(LENGTH))], "sliding layers are left to their own window"
            continue
        assert len(got[layer]) == len(heads)
        for kept, scores in zip(got[layer], heads, strict=True):
            always = set(range(LENGTH)) - set(scores)
            assert len(kept) == CAPACITY and always <= kept
            ranked = sorted(scores.values(), reverse=True)
            last, next_ = ranked[CAPACITY - len(always) - 1], ranked[CAPACITY - len(always)]
            slack = TIES * max(abs(last), abs(next_))
            for t, score in scores.items():
                if score > last + slack or score < next_ - slack:
                    assert (t in kept) == (score > next_), f"layer {layer}: position {t}"
            seen += 1
    assert seen == sum(facts.compressible(i) for i in range(facts.num_layers)) * len(got[facts.num_layers - 1])


def test_expected_attention_keeps_what_the_formula_says(name: str) -> None:
    """Differences of one slot a head are rounding: the loop sums covariances in float64."""
    if name == "gemma270":
        pytest.skip("the loop's rotation is that of models with one rope")
    row = tiny.tokens(60)
    pair = tiny.pair(name)
    cache = pair.cache(**expecting.SETTINGS)
    tiny.forward(pair.model, cache, [row])
    got, expected = loops.held_by(cache), expecting.expected(name, row)
    heads = [(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(a != b for a, b in heads) <= len(heads) // 20
    assert all(len(a ^ b) <= 2 for a, b in heads)

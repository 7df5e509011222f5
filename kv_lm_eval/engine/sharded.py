"""Tensor parallelism (`tp_plan=auto`): every rank holds some of the heads, of every layer and every row.

So a method must choose for each head by what that head holds, or the ranks would keep something else than one rank
would. Found out by letting it choose: for some heads together and for half of them alone.

Shapes: B batch rows, H query heads, K KV heads, G = H / K, N slots, W last queries, D head size.
"""

from __future__ import annotations

import dataclasses

import torch

from kv_lm_eval.cache.moments import QueryMoments
from kv_lm_eval.cache.store import Kept
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View
from kv_lm_eval.methods.compression import Compression

HEADS, GROUP, SIZE = 4, 2, 8
SPARES = (3, 8, 12, 20)  # slots kept beside those that always stay


def check(compression: Compression, ranks: int) -> None:
    """Raises UserError where heads on different ranks would have to know of each other."""
    if ranks > 1 and compression.method.compresses and not each_head_by_itself(compression):
        raise UserError(
            f"method={compression.method.name} as it is set chooses for a head by what other heads hold, or by its "
            f"number, and tp_plan puts them on {ranks} ranks that do not know of each other: other pairs would be kept "
            "than on one. Leave tp_plan out (device_map or parallelize=True split a model by layers), or take a method "
            "and a head_budget that look at each head alone"
        )


def each_head_by_itself(compression: Compression) -> bool:
    """Whether half of the heads alone keep what they keep beside the others."""
    method = compression.method
    if method.head_slots is not None or method.sight(0) is not None or method.projects or method.reads_hidden:
        return False  # windows of numbered heads, projections, or what is known of heads by number
    if compression.ranks_layers:
        return False  # the slots of all heads are ranked together
    return all(_half_alone(compression, spare) for spare in SPARES)


def _half_alone(compression: Compression, spare: int) -> bool:
    """The same where so many slots beside those that always stay are kept: some choices are the same by chance."""
    whole = _view(compression, spare)
    half = _heads(whole, HEADS // 2)
    a, b = _cut(compression, whole), _cut(compression, half)
    for head in range(HEADS // 2):
        for x, y in zip(_of_head(a, head + HEADS // 2), _of_head(b, head), strict=True):
            if x.shape != y.shape or not torch.allclose(x, y):
                return False
    return True


def _view(compression: Compression, spare: int) -> View:
    """One row of random pairs, with everything that a method may ask for."""
    method, random = compression.method, torch.Generator().manual_seed(0)
    slots = 3 * method.protected + 36

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    moments = QueryMoments.none_yet(numbers(1, HEADS * GROUP, 1, SIZE))
    moments.add(numbers(1, HEADS * GROUP, 20, SIZE), torch.ones(1, 20, dtype=torch.bool))
    window = max(1, method.num_queries)
    unlike = torch.arange(1.0, HEADS + 1).double().view(1, -1, 1, 1)  # so that a shared budget is not shared evenly
    weights = (unlike.unsqueeze(-1) * numbers(1, HEADS, GROUP, window, slots)).softmax(-1)
    return View(
        keys=unlike * numbers(1, HEADS, slots, SIZE),
        values=unlike * numbers(1, HEADS, slots, SIZE),
        pos=torch.arange(slots).view(1, 1, -1),
        seen=[slots],
        keep=[method.protected + spare],
        layer=0,
        num_layers=1,
        _mass=(unlike[..., 0] * numbers(1, HEADS, slots)).softmax(-1),
        _attend=lambda last: weights[..., -last:, :],
        _moments=moments,
        scaling=SIZE**-0.5,
        method=method.name,
        _rotate=lambda x, delta, over=1: x,
        _logits=lambda last: weights[..., -last:, :].log(),
        _queries=(numbers(1, HEADS * GROUP, slots, SIZE), torch.arange(slots).view(1, -1)),
    )


def _heads(view: View, first: int) -> View:
    """The view of the heads from `first` on."""
    moments, queries = view.moments, first * GROUP
    assert view._queries is not None
    return dataclasses.replace(
        view,
        keys=view.keys[:, first:],
        _votes={},
        values=view.values[:, first:],
        _mass=view.mass[:, first:],
        _attend=lambda last: view.attention(last)[:, first:],
        _logits=lambda last: view.logits(last)[:, first:],
        _queries=(view._queries[0][:, queries:], view._queries[1]),
        _moments=QueryMoments(moments.count, moments.mean[:, queries:], moments.scatter[:, queries:]),
    )


def _cut(compression: Compression, view: View) -> Kept:
    scores = compression.method.score(view)
    keep = [float(k) for k in view.keep]
    counts = compression.counts(scores, view.pos, keep, view.seen, [float(n) for n in view.seen], 0)
    scores, counts = compression.second_look(view, scores, counts)
    return compression.evicted.cut(compression.method, view, scores, counts)


def _of_head(kept: Kept, head: int) -> list[torch.Tensor]:
    pos = kept.pos[0, head if kept.pos.shape[1] > 1 else 0]
    real = pos >= 0
    return [pos[real].double(), kept.keys[0, head][real], kept.values[0, head][real]]

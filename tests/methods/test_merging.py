"""Treatments that merge evicted pairs into kept ones, against plain loops over their definitions."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from methods.test_kept_sets import held_by

from kv_lm_eval.cache.store import Kept
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View

ROWS, HEADS, SLOTS, SIZE = 3, 2, 30, 4
LAYER = 1


def view_of(seed: int, dtype: torch.dtype, per_head: bool, kept: Kept | None = None) -> tuple[View, torch.Tensor]:
    """Random slots (after those of `kept`, if given) with empty ones before them, and their scores."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(ROWS, HEADS, SLOTS, SIZE, generator=generator).to(dtype) for _ in range(2))
    pos = torch.arange(SLOTS).repeat(ROWS, HEADS if per_head else 1, 1)
    for row in range(ROWS):
        for head in range(pos.shape[1]):
            pos[row, head, : (row * 9 + head * 3)] = -1
    mass = torch.rand(ROWS, HEADS, SLOTS, generator=generator) ** 4
    memory = None
    if kept is not None:
        pos = torch.where(pos >= 0, pos + SLOTS, -1)
        keys, values = torch.cat([kept.keys, keys], 2), torch.cat([kept.values, values], 2)
        old = kept.pos.expand(ROWS, HEADS, -1)
        pos = torch.cat([old, pos.expand(ROWS, HEADS, -1)], 2)
        assert kept.mass is not None
        mass, memory = torch.cat([kept.mass, mass], 2), kept.memory
        order = torch.where(pos < 0, -1, 0).argsort(dim=2, stable=True)  # empty slots come first
        pos, mass = pos.gather(2, order), mass.gather(2, order)
        wide = order.unsqueeze(-1).expand_as(keys)
        keys, values = keys.gather(2, wide), values.gather(2, wide)
    scores = torch.rand(ROWS, HEADS, keys.shape[2], generator=generator)
    seen = [SLOTS] * ROWS
    view = View(keys, values, pos, seen, seen, LAYER, 2, mass, lambda last: keys, memory=memory)
    return view, scores


COUNTS = torch.tensor([[12, 9], [7, 1], [12, 12]])  # the last row has 12 slots or fewer: nothing is evicted


def heads(view: View, scores: torch.Tensor, counts: torch.Tensor):
    """For each row and head: its real slots, those that stay and those that go, oldest first."""
    for b in range(ROWS):
        for k in range(HEADS):
            pos = view.pos[b, k if view.pos.shape[1] > 1 else 0].tolist()
            real = [i for i, p in enumerate(pos) if p >= 0]
            ranked = sorted(real, key=lambda i: (-scores[b, k, i].item(), i))
            stay = sorted(ranked[: int(counts[b, k])])
            yield b, k, pos, stay, [i for i in real if i not in stay]


def coin(seed: int, layer: int, head: int, position: int) -> float:
    """The hash that stands for a draw, in Python's integers."""
    x = position + 0x9E3779B1 * (head + 1) + 0x85EBCA77 * (layer + 1) + 0xC2B2AE3D * (seed + 1)
    for factor in (0x7FEB352D, 0x846CA68B):
        x &= 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 15)) & 0xFFFFFF) / 2**24


def compare(kept: Kept, b: int, k: int, pos: list[int], keys: list, values: list, tolerance: float) -> None:
    """The pairs held by one row and head: their positions exactly, their numbers within the tolerance."""
    ours = kept.pos[b, k if kept.pos.shape[1] > 1 else 0]
    real = ours >= 0
    assert ours[real].tolist() == pos
    for got, wanted in ((kept.keys, keys), (kept.values, values)):
        got = got[b, k, real].float()
        assert got.isfinite().all()
        if wanted:
            assert (got - torch.stack(wanted).float()).abs().max() <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("size", "seed"), [(1, 0), (3, 0), (3, 5), (32, 0)])
def test_cam_spreads_values_over_the_next_kept_tokens(dtype, tolerance, per_head, size, seed):
    part = tiny.compression(method="h2o", max_capacity_prompt=8, evicted="cam", merge_size=size, merge_seed=seed)
    view, scores = view_of(seed, dtype, per_head)
    kept = part.evicted.cut(part.method, view, scores, COUNTS)
    assert kept.values.dtype == dtype
    merged = left = 0
    for b, k, pos, stay, gone in heads(view, scores, COUNTS):
        values = {i: view.values[b, k, i].double() for i in stay}
        for i in gone:
            receivers = [j for j in stay if j > i][:size]
            mean = sum(view.mass[b, k, j].item() for j in receivers) / max(len(receivers), 1)
            if receivers and coin(seed, LAYER, k, pos[i]) < view.mass[b, k, i].item() / mean:
                merged += 1
                for j in receivers:
                    values[j] = values[j] + view.values[b, k, i].double() / size
            else:
                left += 1
        keys = [view.keys[b, k, i] for i in stay]
        compare(kept, b, k, [pos[i] for i in stay], keys, [values[i] for i in stay], tolerance)
    assert merged and left


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("ema", [1.0, 0.7, 0.2])
def test_d2o_merges_pairs_that_resemble_a_kept_one(dtype, tolerance, per_head, ema):
    part = tiny.compression(method="h2o", max_capacity_prompt=8, evicted="d2o", threshold_ema=ema)
    thresholds: dict[tuple[int, int], float] = {}
    kept = None
    merged = left = 0
    for cut in range(3):
        view, scores = view_of(cut, dtype, per_head, kept)
        counts = COUNTS if cut == 0 else COUNTS + cut
        kept = part.evicted.cut(part.method, view, scores, counts)
        for b, k, pos, stay, gone in heads(view, scores, counts):
            keys, values = view.keys[b, k].double(), view.values[b, k].double()
            cosine = {i: [float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm()) for j in stay] for i in gone}
            if gone:
                mean = sum(max(c) for c in cosine.values()) / len(gone)
                thresholds[b, k] = ema * mean + (1 - ema) * thresholds[b, k] if (b, k) in thresholds else mean
            into: dict[int, list[int]] = {j: [] for j in stay}
            for i in gone:
                if max(cosine[i]) >= thresholds[b, k]:
                    merged += 1
                    into[stay[cosine[i].index(max(cosine[i]))]].append(i)
                else:
                    left += 1
            new = []
            for x in (keys, values):
                new.append([])
                for j in stay:
                    weights = [math.exp(max(cosine[i])) for i in into[j]]
                    total = math.e * x[j] + sum(w * x[i] for w, i in zip(weights, into[j], strict=True))
                    new[-1].append(total / (math.e + sum(weights)))
            compare(kept, b, k, [pos[i] for i in stay], new[0], new[1], tolerance)
            if (b, k) in thresholds:
                assert math.isclose(kept.memory[b, k].item(), thresholds[b, k], abs_tol=1e-5)
            else:
                assert kept.memory[b, k] == -math.inf, "no pair was evicted yet"
    assert merged and left


@pytest.mark.parametrize("evicted", ["cam", "d2o"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_merging_changes_what_is_held_and_not_what_is_kept_whatever_the_batch(name, evicted):
    pair, rows = tiny.pair(name), [tiny.tokens(n, seed=n) for n in (60, 33, 12)]
    settings = {"method": "snapkv", "window_size": 5, "max_capacity_prompt": 16, "compress_every": 3}
    caches = [pair.cache(**settings, evicted=e) for e in ("drop", evicted)]
    alone = pair.cache(**settings, evicted=evicted)
    for cache in caches:
        tiny.forward(pair.model, cache, rows)
    assert held_by(caches[0]) == held_by(caches[1])
    assert not torch.equal(caches[0].stores[0].values, caches[1].stores[0].values)
    assert torch.equal(caches[0].stores[0].keys, caches[1].stores[0].keys) == (evicted == "cam")
    tiny.forward(pair.model, alone, rows[1:2])
    fork = caches[1].select([1])
    for step in range(7):
        chunk = [[7 + step]] * 3
        got = tiny.forward(pair.model, caches[1], chunk, starts=[n + step for n in (60, 33, 12)])
        one, two = (tiny.forward(pair.model, c, chunk[:1], starts=[33 + step]) for c in (alone, fork))
        assert torch.allclose(got[1, -1], one[0, -1], atol=1e-4) and torch.allclose(one, two, atol=1e-4)


def test_another_seed_tosses_other_coins():
    pair, row = tiny.pair("llama"), tiny.tokens(60)
    cam = {"method": "snapkv", "window_size": 5, "max_capacity_prompt": 16, "evicted": "cam"}
    caches = [pair.cache(**cam, merge_seed=seed) for seed in (0, 0, 1)]
    for cache in caches:
        tiny.forward(pair.model, cache, [row])
    a, b, c = (cache.stores[0].values for cache in caches)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"method": "knorm", "evicted": "cam"}, "knorm does not look at; use evicted=d2o"),
        ({"method": "snapkv", "evicted": "cam", "merge_size": 0}, "merge_size=0"),
        ({"method": "snapkv", "evicted": "d2o", "threshold_ema": 0}, r"threshold_ema=0.* is outside \(0, 1\]"),
        ({"method": "snapkv", "evicted": "d2o", "merge_size": 4}, "merge_size=4 has no effect with evicted=d2o"),
        ({"method": "streaming_llm", "evicted": "d2o"}, "positions=in_cache rewrites"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        tiny.compression(**args, max_capacity_prompt=64)

"""The quantised store against plain loops over one head's pairs: what is read back, what is coded when, its bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from storage_loops import HEADS, SIZE, VALUE_SIZE, KiviHead, Twins

from kv_lm_eval.cache import coded
from kv_lm_eval.cache.coded import encode
from kv_lm_eval.cache.store import Kept
from kv_lm_eval.methods.storages.kivi import Grouped
from kv_lm_eval.methods.storages.kivi import Kivi as Storage

CASES = [
    (Storage(nbits=8, group_size=4, residual_length=6), 0, 0.8),
    (Storage(nbits=4, group_size=4, residual_length=0), 3, 0.6),
    (Storage(nbits=2, group_size=3, residual_length=5), 2, 0.9),
    (Storage(nbits=4, group_size=5, residual_length=4, key_axis="token", value_axis="channel"), 0, 0.7),
    (Storage(nbits=2, group_size=1, residual_length=1, key_axis="token"), 1, 0.8),
    (Storage(nbits=2, group_size=4, residual_length=2, value_axis="channel"), 0, 0.9),
    (Storage(nbits=3, group_size=4, residual_length=2), 1, 0.9),
    (Storage(nbits=2, k_bits=3, v_bits=8, group_size=3, residual_length=3, key_axis="token"), 0, 0.8),
    (Storage(k_bits=4, v_bits=3, group_size=3, value_axis="channel", residual_length=0), 0, 0.6),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("storage", "sinks", "share"), CASES)
def test_any_course_of_prompts_cuts_and_tokens_reads_back_as_the_loops_do(
    storage: Storage, sinks: int, share: float, seed: int
) -> None:
    twins = Twins(storage, sinks, rows=3, seed=seed)
    twins.feed(23)
    twins.check()
    twins.cut(share)
    twins.settle()
    twins.check()
    for turn in range(14):
        twins.step(1 if turn % 3 else 1 + turn % 4)
        if turn % 4 == 3:
            twins.cut(share, change=0.2 if turn == 7 else 0.0)
        twins.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_reads_back_in_its_own_format(dtype: torch.dtype) -> None:
    twins = Twins(CASES[0][0], 1, rows=2, seed=5, dtype=dtype)
    twins.feed(19)
    twins.settle()
    twins.check()
    twins.cut(0.7)
    twins.step(2)
    twins.check()


def test_a_fork_goes_its_own_way() -> None:
    twins = Twins(CASES[2][0], 2, rows=3, seed=1)
    twins.feed(21)
    twins.settle()
    fork = Twins(CASES[2][0], 2, rows=0, seed=2)
    fork.store = twins.store.select([2, 0, 0])
    fork.seen = [twins.seen[i] for i in (2, 0, 0)]
    for i in (2, 0, 0):
        fork.heads.append([KiviHead(head.storage, head.sinks) for head in twins.heads[i]])
        for new, old in zip(fork.heads[-1], twins.heads[i], strict=True):
            new.pairs, new.serial = [list(p) for p in old.pairs], itertools.count(1000)
    for _ in range(5):
        fork.step(2)
        fork.cut(0.9)
        fork.check()
    twins.check()
    twins.step(1)
    twins.check()


def test_a_sliding_layer_drops_its_oldest_pairs_and_codes_no_other_anew() -> None:
    twins = Twins(CASES[0][0], 0, rows=2, seed=3)
    twins.feed(30)
    twins.settle()
    twins.store.compact(20, first=[10, 10])
    for row in twins.heads:
        for head in row:
            head.pairs = head.pairs[-20:]
    twins.check()


def test_sinks_can_be_rewritten_and_stay_exact() -> None:
    twins = Twins(CASES[1][0], 3, rows=2, seed=4)
    twins.feed(20)
    twins.settle()
    new = twins.numbers(2, HEADS, 3, SIZE)
    first = torch.tensor([0, 11])[:, None] + torch.arange(3)
    twins.store.write_sinks(first[:, None, :, None].expand(2, HEADS, 3, SIZE), new)
    for b, row in enumerate(twins.heads):
        for h, head in enumerate(row):
            for i in range(3):
                head.pairs[i][1] = new[b, h, i].tolist()
    twins.check()


# --- the code itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize(("pairs", "size", "group"), [(1, 1, 32), (37, 8, 32), (64, 33, 32), (5, 16, 3)])
def test_no_number_is_off_by_more_than_half_a_step(axis: str, nbits: int, pairs: int, size: int, group: int) -> None:
    x = torch.randn(2, 3, pairs, size, generator=torch.Generator().manual_seed(pairs)) * 5 + 20
    x[0, 0, :, 0] = 7.3  # a channel without any spread
    packed = encode(Grouped(nbits, group, axis), x, torch.ones(2, 3, pairs, dtype=torch.bool))
    codes = packed.of_pair["codes"]
    assert codes.dtype == torch.uint8 and codes.shape[3] == -(-size * nbits // 8), "really packed"
    scales = packed.of_group["scale"] if axis == "channel" else packed.of_pair["scale"]
    assert scales.dtype == torch.float16
    error = (packed.decode() - x).abs()
    for b, h, i, d in itertools.product(range(2), range(3), range(pairs), range(size)):
        if axis == "channel":
            first = i // group * group
            scale, numbers = scales[b, h, i // group, d], x[b, h, first : first + group, d]
        else:
            first = d // group * group
            scale, numbers = scales[b, h, i, d // group], x[b, h, i, first : first + group]
        float16 = 2**-11 * (numbers.min().abs() + (numbers.max() - numbers.min())) * 1.01
        assert error[b, h, i, d] <= scale.float() / 2 + float16 + 1e-6


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_long_prompts_are_coded_and_read_in_blocks_to_the_same_numbers(
    axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, real = torch.randn(2, 3, 90, 8), torch.rand(2, 3, 90) < 0.9
    whole = encode(Grouped(4, 4, axis), x, real)
    monkeypatch.setattr(coded, "BLOCK_SLOTS", 11)
    parts = encode(Grouped(4, 4, axis), x, real)
    for table, same in ((whole.of_pair, parts.of_pair), (whole.of_group, parts.of_group)):
        assert table.keys() == same.keys() and all(torch.equal(table[name], same[name]) for name in table)
    assert torch.equal(whole.decode(), parts.decode())


def test_pairs_that_are_not_real_take_no_part_in_their_group() -> None:
    x = torch.randn(1, 1, 6, 4)
    x[:, :, 1::2] = float("nan")
    real = torch.tensor([True, False] * 3).view(1, 1, 6)
    packed = encode(Grouped(8, 32, "channel"), x, real)
    assert torch.equal(packed.of_group["zero"][0, 0, 0], x[0, 0, ::2].amin(0).half())
    assert packed.decode().isfinite().all()


def test_a_thousand_cuts_leave_a_survivor_as_it_was() -> None:
    storage = Storage(nbits=2, group_size=4, residual_length=4)
    twins = Twins(storage, 0, rows=1, seed=0)
    store = twins.store
    twins.feed(40)
    store.settle()
    survivor = store.keys[0, 0, 5].clone()
    kept = [5, *range(20, 40)]
    for token in range(40, 1040):
        slots = torch.tensor(kept).view(1, 1, -1)
        keys, values, pos = (x[:, :, kept] for x in (store.keys, store.values, store.pos))
        store.replace(Kept(keys, values, pos, None, slots=slots), room=1)
        keys, values = twins.numbers(1, HEADS, 1, SIZE), twins.numbers(1, HEADS, 1, VALUE_SIZE)
        store.append(keys, values, torch.tensor([[token]]))
        if storage.due(token, token + 1):
            store.settle()
        kept = [0, *range(2, 22)]
    assert torch.equal(store.keys[0, 0, 0], survivor)
    assert store.pos[0, 0].tolist() == [5, *range(1019, 1040)]


def test_of_two_pairs_with_one_position_each_keeps_its_own_codes() -> None:
    """An average takes the position of a token that may be kept too: a survivor is told by its slot."""
    storage = Storage(nbits=4, group_size=4, residual_length=0)
    twins = Twins(storage, 0, rows=1, seed=1)
    store = twins.store
    twins.feed(16)
    store.settle()
    average = twins.numbers(1, HEADS, 1, SIZE), twins.numbers(1, HEADS, 1, VALUE_SIZE)
    slots = torch.tensor([[[0, 1, 3, 3, 4, 5]]]).expand(1, HEADS, -1)  # the second of the two 3s is an average
    pos = store.pos[:, :, slots[0, 0]]

    def beside(x: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :, [0, 1, 3]], new, x[:, :, [4, 5]]], dim=2)

    store.replace(Kept(beside(store.keys, average[0]), beside(store.values, average[1]), pos, None, slots=slots), 1)
    survivors = store._coded_keys.group[0, 0].tolist()  # the group of each pair: that of the average is new
    for _ in range(3):  # both stay: nothing is coded anew
        before, groups = (store.keys.clone(), store.values.clone()), store._coded_keys.group.clone()
        same = torch.arange(6).view(1, 1, -1)
        store.replace(Kept(store.keys, store.values, store.pos, None, slots=same), 1)
        assert torch.equal(before[0], store.keys) and torch.equal(before[1], store.values)
        assert torch.equal(groups, store._coded_keys.group)
    assert survivors == [0, 0, 0, 2, 1, 1]

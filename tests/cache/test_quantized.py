"""The quantised store against plain loops over one head's pairs: what is read back, what is coded when, its bytes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from kv_lm_eval.cache import quantized
from kv_lm_eval.cache.quantized import Packed, QuantizedStore
from kv_lm_eval.cache.store import Kept
from kv_lm_eval.methods.storage import Storage

F16, F32 = np.float16, np.float32
HEADS, SIZE, VALUE_SIZE = 2, 7, 5


def read_back(numbers: list[float], nbits: int) -> list[float]:
    """A group of numbers, coded and read again."""
    low, high = F32(min(numbers)), F32(max(numbers))
    zero = F16(low)
    scale = F16(max(F32(0), (high - F32(zero)) / F32(2**nbits - 1)))
    step = F32(scale) if scale else F32(1)
    codes = [min(max(int(np.rint((F32(x) - F32(zero)) / step)), 0), 2**nbits - 1) for x in numbers]
    return [float(F32(F32(c) * F32(scale)) + F32(zero)) for c in codes]


class Head:
    """One row and head, in plain lists: pairs [position, key, value, group of the key, group of the value].

    The groups are None for an exact pair; a pair's vectors are those that are read back.
    """

    def __init__(self, storage: Storage, sinks: int) -> None:
        self.storage, self.sinks, self.pairs, self.serial = storage, sinks, [], itertools.count()

    def add(self, pos: int, key: list[float], value: list[float]) -> None:
        self.pairs.append([pos, key, value, None, None])

    def code(self, pairs: list[list], which: int, axis: str) -> None:
        """Codes the keys (which=1) or values (2) of these pairs, group by group."""
        size = self.storage.group_size
        for first in range(0, len(pairs), size):
            group, members = next(self.serial), pairs[first : first + size]
            table = [p[which] for p in members]
            if axis == "channel":
                columns = [read_back(list(column), self.storage.nbits) for column in zip(*table, strict=True)]
                table = [list(row) for row in zip(*columns, strict=True)]
            else:
                table = [
                    [y for i in range(0, len(row), size) for y in read_back(row[i : i + size], self.storage.nbits)]
                    for row in table
                ]
            for p, row in zip(members, table, strict=True):
                p[which], p[which + 2] = row, group

    def settle(self) -> None:
        exact = [p for p in self.pairs[self.sinks :] if p[3] is None]
        leaving = max(0, len(exact) - self.storage.residual_length) // self.storage.group_size
        leaving = exact[: leaving * self.storage.group_size]
        self.code(leaving, 1, self.storage.key_axis)
        self.code(leaving, 2, self.storage.value_axis)

    def cut(self, kept: list[int], changed: dict[int, list[float]]) -> None:
        """Keeps the pairs at these places; changed: new values of some of them, by place."""
        for place, value in changed.items():
            self.pairs[place][2] = value
        again = [self.pairs[i] for i in kept if i in changed and self.pairs[i][4] is not None]
        self.code(again, 2, self.storage.value_axis)
        self.pairs = [self.pairs[i] for i in kept]

    def bytes(self, element: int) -> int:
        total = 0
        for which, size, axis in ((1, SIZE, self.storage.key_axis), (2, VALUE_SIZE, self.storage.value_axis)):
            coded = [p for p in self.pairs if p[which + 2] is not None]
            total += (len(self.pairs) - len(coded)) * size * element
            total += len(coded) * -(-size * self.storage.nbits // 8)
            if axis == "channel":
                total += len(coded) * 2 + len({p[which + 2] for p in coded}) * size * 4
            else:
                total += len(coded) * -(-size // self.storage.group_size) * 4
        return total


class Twins:
    """A store of several rows, and a Head for each row and head; everything is done to both."""

    def __init__(self, storage: Storage, sinks: int, rows: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.random, self.dtype, self.storage = random.Random(seed), dtype, storage
        self.generator = torch.Generator().manual_seed(seed)
        self.store = QuantizedStore(storage, sinks)
        self.heads = [[Head(storage, sinks) for _ in range(HEADS)] for _ in range(rows)]
        self.seen = [0] * rows

    def numbers(self, *shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * 3 + 1).to(self.dtype)

    def feed(self, count: int) -> None:
        """So many tokens of each row."""
        rows = len(self.heads)
        keys, values = self.numbers(rows, HEADS, count, SIZE), self.numbers(rows, HEADS, count, VALUE_SIZE)
        pos = torch.tensor(self.seen)[:, None] + torch.arange(count)
        for b, h, i in itertools.product(range(rows), range(HEADS), range(count)):
            self.heads[b][h].add(self.seen[b] + i, keys[b, h, i].tolist(), values[b, h, i].tolist())
        self.seen = [n + count for n in self.seen]
        self.store.append(keys, values, pos)

    def cut(self, share: float, change: float = 0.0) -> None:
        """Keeps a random share of each head's pairs, the sinks among them, and changes some values."""
        pos, keys, values = (x.clone() for x in (self.store.pos, self.store.keys, self.store.values))
        pos = pos.expand(-1, HEADS, -1).clone()
        chosen = []
        for b, row in enumerate(self.heads):
            for h, head in enumerate(row):
                places = [i for i in range(len(head.pairs)) if i < head.sinks or self.random.random() < share]
                slots = [s for s, p in enumerate(pos[b, h].tolist()) if p >= 0]
                changed = {}
                for i in places:
                    if self.random.random() < change:
                        new = self.numbers(VALUE_SIZE)
                        values[b, h, slots[i]], changed[i] = new, new.tolist()
                head.cut(places, changed)
                chosen.append([slots[i] for i in places])
        width = max(map(len, chosen))
        index = torch.tensor([[0] * (width - len(c)) + c for c in chosen]).view(len(self.heads), HEADS, width)
        real = torch.tensor([[False] * (width - len(c)) + [True] * len(c) for c in chosen]).view_as(index)
        wide = index.unsqueeze(-1)
        kept = Kept(
            keys.gather(2, wide.expand(-1, -1, -1, SIZE)),
            values.gather(2, wide.expand(-1, -1, -1, VALUE_SIZE)),
            torch.where(real, pos.gather(2, index), -1),
            None,
            slots=index,
        )
        self.store.replace(kept, room=1)

    def settle(self) -> None:
        self.store.settle()
        for head in itertools.chain(*self.heads):
            head.settle()

    def step(self, count: int) -> None:
        before = self.seen[0]
        self.feed(count)
        if self.storage.due(before, self.seen[0]):
            self.settle()

    def check(self) -> None:
        keys, values = self.store.keys, self.store.values
        pos = self.store.pos.expand(-1, HEADS, -1)
        assert keys.isfinite().all() and values.isfinite().all() and keys.dtype == self.dtype
        for b, row in enumerate(self.heads):
            for h, head in enumerate(row):
                real = pos[b, h] >= 0
                assert pos[b, h][real].tolist() == [p[0] for p in head.pairs]
                for got, which in ((keys, 1), (values, 2)):
                    want = torch.tensor([p[which] for p in head.pairs]).to(self.dtype)
                    assert torch.equal(got[b, h][real], want.view(-1, got.shape[3]))
        element = keys.element_size()
        expected = [sum(head.bytes(element) for head in row) for row in self.heads]
        held = [sum(len(head.pairs) for head in row) / HEADS for row in self.heads]
        assert self.store.valid_bytes(held) == expected
        coded = [x for x in (self.store._coded_keys, self.store._coded_values) if x is not None]
        tensors = [self.store._exact_keys, self.store._exact_values]
        tensors += [t for x in coded for t in vars(x).values() if isinstance(t, torch.Tensor)]
        assert self.store.allocated_bytes == sum(t.untyped_storage().nbytes() for t in tensors) >= sum(expected)


CASES = [
    (Storage(nbits=8, group_size=4, residual_length=6), 0, 0.8),
    (Storage(nbits=4, group_size=4, residual_length=0), 3, 0.6),
    (Storage(nbits=2, group_size=3, residual_length=5), 2, 0.9),
    (Storage(nbits=4, group_size=5, residual_length=4, key_axis="token", value_axis="channel"), 0, 0.7),
    (Storage(nbits=2, group_size=1, residual_length=1, key_axis="token"), 1, 0.8),
    (Storage(nbits=2, group_size=4, residual_length=2, value_axis="channel"), 0, 0.9),
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
        fork.heads.append([Head(head.storage, head.sinks) for head in twins.heads[i]])
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
@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize(("pairs", "size", "group"), [(1, 1, 32), (37, 8, 32), (64, 33, 32), (5, 16, 3)])
def test_no_number_is_off_by_more_than_half_a_step(axis: str, nbits: int, pairs: int, size: int, group: int) -> None:
    x = torch.randn(2, 3, pairs, size, generator=torch.Generator().manual_seed(pairs)) * 5 + 20
    x[0, 0, :, 0] = 7.3  # a channel without any spread
    storage = Storage(nbits=nbits, group_size=group)
    packed = Packed.encode(x, torch.ones(2, 3, pairs, dtype=torch.bool), storage, axis)
    assert packed.codes.dtype == torch.uint8 and packed.codes.shape[3] == -(-size * nbits // 8), "really packed"
    assert packed.scale.dtype == packed.zero.dtype == torch.float16
    error = (packed.decode() - x).abs()
    for b, h, i, d in itertools.product(range(2), range(3), range(pairs), range(size)):
        if axis == "channel":
            first = i // group * group
            scale, numbers = packed.scale[b, h, i // group, d], x[b, h, first : first + group, d]
        else:
            first = d // group * group
            scale, numbers = packed.scale[b, h, i, d // group], x[b, h, i, first : first + group]
        float16 = 2**-11 * (numbers.min().abs() + (numbers.max() - numbers.min())) * 1.01
        assert error[b, h, i, d] <= scale.float() / 2 + float16 + 1e-6


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_long_prompts_are_coded_and_read_in_blocks_to_the_same_numbers(
    axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, real = torch.randn(2, 3, 90, 8), torch.rand(2, 3, 90) < 0.9
    storage = Storage(nbits=4, group_size=4)
    whole = Packed.encode(x, real, storage, axis)
    monkeypatch.setattr(quantized, "BLOCK_SLOTS", 11)
    parts = Packed.encode(x, real, storage, axis)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.decode(), parts.decode())


def test_pairs_that_are_not_real_take_no_part_in_their_group() -> None:
    x = torch.randn(1, 1, 6, 4)
    x[:, :, 1::2] = float("nan")
    real = torch.tensor([True, False] * 3).view(1, 1, 6)
    packed = Packed.encode(x, real, Storage(nbits=8, group_size=32), "channel")
    assert torch.equal(packed.zero[0, 0, 0], x[0, 0, ::2].amin(0).half())
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

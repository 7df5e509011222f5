"""Storage forms in plain loops over one head's pairs, and a store beside them to which the same is done.

Nothing here is shared with the package: numbers are coded and read one by one, in the precision that a form says.
"""

from __future__ import annotations

import functools
import itertools
import math
import random

import numpy as np
import torch

from kv_lm_eval.cache.quantized import QuantizedStore
from kv_lm_eval.cache.store import Kept
from kv_lm_eval.methods.storage import Storage
from kv_lm_eval.methods.storages.fp8 import Fp8
from kv_lm_eval.methods.storages.kivi import Kivi
from kv_lm_eval.methods.storages.think import Think
from kv_lm_eval.methods.storages.turboquant import TurboQuant

F16, F32 = np.float16, np.float32
HEADS, GROUP, SIZE, VALUE_SIZE = 2, 3, 7, 5


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

    element = 4  # bytes of a number of the model's
    near = least = 0.0  # how far a vector that is read may be from the loops', as a share of its length

    def __init__(self, storage: Storage, sinks: int) -> None:
        self.storage, self.sinks, self.pairs, self.serial = storage, sinks, [], itertools.count()

    def add(self, pos: int, key: list[float], value: list[float]) -> None:
        self.pairs.append([pos, key, value, None, None])

    def code(self, pairs: list[list], which: int) -> None:
        """Codes the keys (which=1) or values (2) of these pairs."""
        raise NotImplementedError

    def coded_bytes(self, which: int, size: int) -> int:
        """Of the keys or values of all coded pairs, D = size."""
        raise NotImplementedError

    def coded(self, which: int) -> list[list]:
        return [p for p in self.pairs if p[which + 2] is not None]

    def bits(self, which: int) -> int:
        return (self.storage.k_bits if which == 1 else self.storage.v_bits) or self.storage.nbits

    def settle(self) -> None:
        exact = [p for p in self.pairs[self.sinks :] if p[3] is None]
        leaving = max(0, len(exact) - self.storage.residual_length) // self.storage.step
        leaving = exact[: leaving * self.storage.step]
        self.code(leaving, 1)
        self.code(leaving, 2)

    def cut(self, kept: list[int], changed: dict[int, list[float]]) -> None:
        """Keeps the pairs at these places; changed: new values of some of them, by place."""
        for place, value in changed.items():
            self.pairs[place][2] = value
        again = [self.pairs[i] for i in kept if i in changed and self.pairs[i][4] is not None]
        self.code(again, 2)
        self.pairs = [self.pairs[i] for i in kept]

    def bytes(self, element: int) -> int:
        total = 0
        for which, size in ((1, SIZE), (2, VALUE_SIZE)):
            total += (len(self.pairs) - len(self.coded(which))) * size * element + self.coded_bytes(which, size)
        return total


class KiviHead(Head):
    def code(self, pairs: list[list], which: int) -> None:
        axis = self.storage.key_axis if which == 1 else self.storage.value_axis
        size, bits = self.storage.group_size, self.bits(which)
        for first in range(0, len(pairs), size):
            group, members = next(self.serial), pairs[first : first + size]
            table = [p[which] for p in members]
            if axis == "channel":
                columns = [read_back(list(column), bits) for column in zip(*table, strict=True)]
                table = [list(row) for row in zip(*columns, strict=True)]
            else:
                table = [
                    [y for i in range(0, len(row), size) for y in read_back(row[i : i + size], bits)] for row in table
                ]
            for p, row in zip(members, table, strict=True):
                p[which], p[which + 2] = row, group

    def coded_bytes(self, which: int, size: int) -> int:
        coded, axis = self.coded(which), (self.storage.key_axis, self.storage.value_axis)[which - 1]
        total = len(coded) * -(-size * self.bits(which) // 8)
        if axis == "channel":
            return total + len(coded) * 2 + len({p[which + 2] for p in coded}) * size * 4
        return total + len(coded) * -(-size // self.storage.group_size) * 4


def float8(code: int, exponent_bits: int) -> float:
    """The number that a byte stands for by its bits: a sign, an exponent, the rest mantissa."""
    mantissa_bits = 7 - exponent_bits
    sign, exponent = code >> 7, code >> mantissa_bits & 2**exponent_bits - 1
    mantissa, bias = code & 2**mantissa_bits - 1, 2 ** (exponent_bits - 1) - 1
    if exponent_bits == 5 and exponent == 31:  # as in IEEE 754
        value = math.inf if mantissa == 0 else math.nan
    elif exponent_bits == 4 and exponent == 15 and mantissa == 7:  # "fn": no infinity, one NaN
        value = math.nan
    elif exponent == 0:
        value = mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
    else:
        value = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
    return -value if sign else value


FLOATS = {
    name: {code: x for code in range(256) if math.isfinite(x := float8(code, bits))}
    for name, bits in (("e4m3", 4), ("e5m2", 5))
}


def to_float8(x: float, name: str) -> int:
    """The byte whose number is nearest, of two the one with an even last bit; what is larger than all, the largest."""
    return min(FLOATS[name], key=lambda code: (abs(FLOATS[name][code] - x), code & 1, code))


class Fp8Head(Head):
    """A scale for the head that stays, for every pair, or 1."""

    def __init__(self, storage: Storage, sinks: int) -> None:
        super().__init__(storage, sinks)
        self.scales: dict[int, F32] = {}

    def code(self, pairs: list[list], which: int) -> None:
        name, largest = self.storage.fp8_format, F32(max(FLOATS[self.storage.fp8_format].values()))
        if pairs and which not in self.scales:
            self.scales[which] = F32(max(abs(F32(x)) for p in pairs for x in p[which])) / largest
        for p in pairs:
            numbers = [F32(x) for x in p[which]]
            if self.storage.fp8_scale == "token":
                scale = max(max(abs(x) for x in numbers) / largest, F32(1e-6))
                numbers = [x * (F32(1) / scale) for x in numbers]
            else:
                scale = self.scales[which] if self.storage.fp8_scale == "head" else F32(1)
                numbers = [x / scale for x in numbers]
            p[which] = [float(F32(FLOATS[name][to_float8(float(x), name)]) * scale) for x in numbers]
            p[which + 2] = next(self.serial)

    def coded_bytes(self, which: int, size: int) -> int:
        count = len(self.coded(which))
        each = {"head": 0, "token": 4, "unit": 0}[self.storage.fp8_scale]
        return count * (size + each) + (4 if count and self.storage.fp8_scale == "head" else 0)


@functools.cache
def lloyd_max(bits: int, points: int = 4001, reach: float = 9.0) -> np.ndarray:
    """Codewords for N(0, 1), ascending: each the mean of its cell, by the trapezoidal rule on a fine grid."""
    words, share = np.linspace(-2, 2, 2**bits), np.linspace(0, 1, points)
    ends = np.ones(points)
    ends[[0, -1]] = 0.5
    for _ in range(5000):
        edges = np.concatenate([[-reach], (words[1:] + words[:-1]) / 2, [reach]])
        grid = edges[:-1, None] + np.diff(edges)[:, None] * share
        weight = np.exp(-(grid**2) / 2) * ends
        new = (grid * weight).sum(1) / weight.sum(1)
        if np.abs(new - words).max() < 1e-9:
            break
        words = new
    return words


class TurboHead(Head):
    """In float64, but for the norms, which are held in float16."""

    @property
    def near(self) -> float:
        """Half a float16's last digit, where a residual's norm may be rounded to either side; float32 elsewhere."""
        return 5e-4 if self.storage.qjl else 2e-5

    def code(self, pairs: list[list], which: int) -> None:
        bits = self.bits(which) - self.storage.qjl
        words = lloyd_max(bits)
        for p in pairs:
            x = np.array(p[which])
            size, codec = len(x), self.storage.keys
            turn, *rest = (t.double().numpy() for t in codec.tables(size, torch.device("cpu"))[1:])
            norm = np.linalg.norm(x)
            turned = turn @ (x / norm) * np.sqrt(size)
            nearest = [words[np.abs(words - y).argmin()] for y in turned]
            unit = turn.T @ np.array(nearest) / np.sqrt(size)
            if self.storage.qjl:
                left = x / norm - unit
                signs = [1.0 if s @ left >= 0 else -1.0 for s in rest[0]]
                unit = unit + np.sqrt(np.pi / 2) / size * F16(np.linalg.norm(left)) * (rest[0].T @ signs)
            p[which], p[which + 2] = (float(F16(norm)) * unit).tolist(), next(self.serial)

    def coded_bytes(self, which: int, size: int) -> int:
        bits = self.bits(which) - self.storage.qjl
        each = -(-size * bits // 8) + 2 + (-(-size // 8) + 2 if self.storage.qjl else 0)
        return len(self.coded(which)) * each


class ThinkHead(Head):
    """Channels by sums over lists, chosen when pairs might first lose some."""

    def __init__(self, storage: Storage, sinks: int) -> None:
        super().__init__(storage, sinks)
        self.queries: list[list[list[float]]] = [[] for _ in range(GROUP)]
        self.channels: list[int] = []

    def settle(self) -> None:
        if not self.channels:
            worth = []
            for d in range(SIZE):
                last = [q[d] for own in self.queries for q in own[-self.storage.channel_queries :]]
                wanted = math.fsum(x * x for x in last) / len(last)
                worth.append(wanted * math.fsum(p[1][d] ** 2 for p in self.pairs) / len(self.pairs))
            removed = int(SIZE * self.storage.key_channel_ratio)
            self.channels = sorted(sorted(range(SIZE), key=lambda d: (-worth[d], d))[: SIZE - removed])
        super().settle()

    def code(self, pairs: list[list], which: int) -> None:
        for p in pairs:
            if which == 1:
                p[1] = [x if d in self.channels else 0.0 for d, x in enumerate(p[1])]
            p[which + 2] = next(self.serial)

    def coded_bytes(self, which: int, size: int) -> int:
        count = len(self.coded(which))
        if which == 2:
            return count * size * self.element
        return count * len(self.channels) * self.element + (len(self.channels) if count else 0)  # a list of bytes


HEAD_OF = {Think: ThinkHead, Kivi: KiviHead, Fp8: Fp8Head, TurboQuant: TurboHead}


class Twins:
    """A store of several rows, and a Head for each row and head; everything is done to both."""

    def __init__(self, storage: Storage, sinks: int, rows: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.random, self.dtype, self.storage = random.Random(seed), dtype, storage
        self.generator = torch.Generator().manual_seed(seed)
        self.store = QuantizedStore(storage, sinks)
        self.heads = [[HEAD_OF[type(storage)](storage, sinks) for _ in range(HEADS)] for _ in range(rows)]
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
        if self.storage.watches:
            queries = self.numbers(rows, HEADS * GROUP, count, SIZE)
            for b, h, g in itertools.product(range(rows), range(HEADS), range(GROUP)):
                self.heads[b][h].queries[g] += queries[b, h * GROUP + g].tolist()
            self.store.watch(queries)

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
                        new = self.numbers(VALUE_SIZE) * 2
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
                    want = torch.tensor([p[which] for p in head.pairs]).to(self.dtype).view(-1, got.shape[3])
                    if near := max(head.near, head.least):
                        assert ((got[b, h][real] - want).norm(dim=-1) <= near * want.norm(dim=-1)).all()
                    else:
                        assert torch.equal(got[b, h][real], want)
        element = keys.element_size()
        for head in itertools.chain(*self.heads):
            head.element = element
        expected = [sum(head.bytes(element) for head in row) for row in self.heads]
        held = [sum(len(head.pairs) for head in row) / HEADS for row in self.heads]
        assert self.store.valid_bytes(held) == expected
        tensors = [self.store._exact_keys, self.store._exact_values]
        for held in filter(None, (self.store._coded_keys, self.store._coded_values)):
            tensors += [t for table in (held.of_pair, held.of_group, held.of_head) for t in table.values()]
            tensors += [] if held.group is None else [held.group]
        assert self.store.allocated_bytes == sum(t.untyped_storage().nbytes() for t in tensors) >= sum(expected)

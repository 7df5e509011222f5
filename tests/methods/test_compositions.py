"""Every method with every way to share a budget, to cut again, to treat what goes and to hold what stays: refused in a
line that names the setting, or kept sets are those of plain loops over its own scores, whatever stands beside a row.

The scores are what the method says at each cut; that they are right is each method's own test. All else is written anew
here: who shares what, in which order, and what always stays.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import tiny
import torch

from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import base, evicted, storage
from kv_lm_eval.methods.compression import Compression

LENGTHS, STEPS, SLOTS, INF = (60, 41, 24), 4, 12, float("inf")
PARTS: dict[str, dict[str, Any]] = {
    "later cuts": {"compress_every": 2},
    "ada": {"head_budget": "ada"},
    "ada, later cuts": {"head_budget": "ada", "alpha": 0, "compress_every": 2},
    "ada with a floor": {"head_budget": "ada_floor", "alpha": 0.5},
    "pyramid": {"layer_budget": "pyramid"},
    "pyramid of ada": {"layer_budget": "pyramid", "head_budget": "ada", "compress_every": 2},
    "global": {"layer_budget": "global"},
    "global, later cuts": {"layer_budget": "global", "compress_every": 2},
    "chunks": {"unit": "chunk", "unit_size": 3},
    "chunks, later cuts": {"unit": "chunk", "unit_size": 3, "compress_every": 2},
    "a threshold": {"threshold": 0.02, "threshold_recent": 3, "compress_every": 2},
}
PARTS |= {
    f"evicted={name}": {"evicted": name, **evicted.load(name).example(SLOTS), "compress_every": 2}
    for name in evicted.available()
    if name != "drop"
}
PARTS["evicted=compensate, all alike"] = {**PARTS["evicted=compensate"], "weight": "uniform"}
PARTS |= {
    f"held as {name}": {**storage.load(name).example(), "compress_every": 2}
    for name in storage.available()
    if name != "auto"
}
METHODS = tiny.methods(lambda cls: cls.compresses and cls.uses_cache and not cls.ring)


def composed(method: str, more: dict[str, Any]) -> Compression | str:
    """The two put together, or why they are refused."""
    settings = tiny.free(method, SLOTS)
    if "threshold" in more:
        settings.pop("max_capacity_prompt", None)
    try:
        return tiny.compression(**{**settings, **more})
    except UserError as error:
        return str(error)


# --- the loops ------------------------------------------------------------------------------------------------------

Scores = list[dict[int, float]]  # by head, of each position that it holds


def pyramid(mean: int, seen: int, layer: int, protected: int) -> int:
    """Of two layers with beta=20."""
    scored = mean - protected
    more = max(0, min(scored - scored // 20, mean - max(protected, 1), seen - mean))
    return mean if seen <= mean else mean + more if layer == 0 else mean - more


def shared(scores: Scores, mean: int, compression: Compression) -> list[int]:
    """Slots of each head of a layer that has `mean` on average."""
    how, alpha = compression.heads.head_budget, Fraction(str(compression.heads.alpha))
    if how == "uniform" or len(scores) == 1:
        return [min(mean, len(own)) for own in scores]
    sure = [set[int]() for _ in scores]
    if how == "ada_floor" and alpha and mean:
        sure = [set(best(own, max(1, int(mean * float(alpha))))) for own in scores]
    ranked = sorted((t not in sure[h], -s, h, t) for h, own in enumerate(scores) for t, s in own.items())
    chosen = [h for _, _, h, _ in ranked[: mean * len(scores)]]
    wanted = [chosen.count(h) for h in range(len(scores))]
    if how == "ada_floor":
        return wanted
    exact = [(1 - alpha) * w + alpha * mean for w in wanted]
    slots = [min(math.floor(x), len(own)) for x, own in zip(exact, scores, strict=True)]
    while sum(slots) < min(mean * len(scores), sum(map(len, scores))):
        room = [h for h, own in enumerate(scores) if slots[h] < len(own)]
        slots[max(room, key=lambda h: (exact[h] - slots[h], -h))] += 1
    return slots


def best(own: dict[int, float], count: int) -> list[int]:
    return sorted(own, key=lambda t: (-own[t], t))[:count]


def whole_chunks(scores: Scores, count: int, size: int) -> set[int]:
    """What always stays, then whole chunks, best mean of the sum over heads first, then the best of the next one."""
    real = [s for own in scores for s in own.values() if s != INF]
    highest = max(real, default=0.0)
    total = {t: sum(highest if own[t] == INF else own[t] for own in scores) for t in scores[0]}
    kept = {t for t in total if any(own[t] == INF for own in scores)}
    order = sorted(total)
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    for chunk in sorted(chunks, key=lambda c: (-sum(total[t] for t in c) / len(c), c[0])):
        for t in sorted(chunk, key=lambda t: (-total[t], t)):
            if len(kept) < count:
                kept.add(t)
    return kept


def numbers(compression: Compression, scores: dict[int, Scores], seen: int) -> dict[int, list[int]]:
    """Slots of each head, by layer, of all layers that are cut together."""
    budget = compression.budget
    if budget.open:
        return {i: [sum(s >= budget.threshold for s in own.values()) for own in heads] for i, heads in scores.items()}
    protected = compression.method.protected
    mean = max(int(budget.asked([seen], [seen], 0)[0]), protected, 1)
    how = compression.layers.layer_budget
    if how == "global":
        places = [(-s, i, h, t) for i, heads in scores.items() for h, own in enumerate(heads) for t, s in own.items()]
        stays = sorted(places)[: mean * sum(map(len, scores.values()))]
        return {i: [sum(p[1:3] == (i, h) for p in stays) for h in range(len(heads))] for i, heads in scores.items()}
    found = {}
    for i, heads in scores.items():
        keep = pyramid(mean, seen, i, protected) if how == "pyramid" else mean
        held = sum(map(len, heads)) / len(heads)
        found[i] = list(map(len, heads)) if held <= keep else shared(heads, keep, compression)
    return found


# --- the runs -------------------------------------------------------------------------------------------------------


class Run:
    """A batch under a compression, forward by forward, and what was said at each cut."""

    def __init__(self, compression: Compression, rows: list[list[int]], lengths: list[int]) -> None:
        self.pair, self.rows, self.lengths, self.compression = tiny.pair("llama"), rows, lengths, compression
        self.cache = make_cache(compression, self.pair.facts)
        self.heads = self.cache.facts.heads[0][1]

    def step(self, number: int) -> list[list[list[set[int]]]]:
        """Forward number 0 is the prompt. Kept sets by row, layer and head."""
        fed = [
            row[:n] if number == 0 else row[n + number - 1 : n + number]
            for row, n in zip(self.rows, self.lengths, strict=True)
        ]
        self.said: dict[tuple[int, int], list[Scores]] = {}
        tiny.forward(self.pair.model, self.cache, fed, [n + number - 1 for n in self.lengths] if number else None)
        if number == 0:
            self.cache.gather()
        return [self.held(b) for b in range(len(self.rows))]

    def held(self, row: int) -> list[list[set[int]]]:
        found = []
        for layer in range(2):
            heads = tiny.kept(self.cache, layer, row)
            found.append([set(head) for head in (heads if len(heads) > 1 else heads * self.heads)])
        return found

    def note(self, view: base.View, scores: torch.Tensor) -> None:
        """What each row's heads scored, one entry where all are alike; rows are told apart by their lengths."""
        heads = max(view.pos.shape[1], scores.shape[1])
        pos, values = (x.expand(-1, heads, -1).tolist() for x in (view.pos, scores.double()))
        for b, seen in enumerate(view.seen):
            own = [{t: s for t, s in zip(*pair, strict=True) if t >= 0} for pair in zip(pos[b], values[b], strict=True)]
            self.said.setdefault((seen, view.layer), []).append(own)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch):
    """The run that is listening, in a list of one."""
    listening: list[Run] = []
    score, second = Compression.score, Compression.second_look

    def scored(self: Compression, view: base.View) -> torch.Tensor:
        found = score(self, view)
        listening[0].note(view, found)
        return found

    def looked(self: Compression, view: base.View, scores: torch.Tensor, counts: torch.Tensor) -> Any:
        listening[0].note(view, self.method.rescore(view, scores, counts))
        return second(self, view, scores, counts)

    monkeypatch.setattr(Compression, "score", scored)
    monkeypatch.setattr(Compression, "second_look", looked)
    return listening


def expected(run: Run, seen: int, before: list[list[set[int]]]) -> list[list[set[int]]]:
    """Kept sets of the row that has seen so many tokens, from what was said in the last forward."""
    compression = run.compression
    first = {i: run.said[seen, i][0] for i in range(2) if (seen, i) in run.said}
    counts, after = numbers(compression, first, seen), [list(layer) for layer in before]
    for i, scores in first.items():
        alike = run.heads // len(scores)  # heads for which an entry stands
        assert [set(own) for own in scores] * alike == before[i], "it scores what is held"
        last = run.said[seen, i][-1]
        after[i] = [set(best(own, count)) for own, count in zip(last, counts[i], strict=True)] * alike
        if compression.unit.whole:
            after[i] = [whole_chunks(last, counts[i][0], compression.unit.unit_size)] * run.heads
    return after


def takes_as_many(compression: Compression) -> bool:
    """Whether what stays are the tokens themselves: where pairs are averaged they stand at positions of their own."""
    return compression.evicted.evicted != "compensate"


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_is_what_the_loops_choose_and_the_rest_is_refused(method: str, noted: list[Run]) -> None:
    rows, ran = [tiny.tokens(n + STEPS, seed=n) for n in LENGTHS], 0
    for part, more in PARTS.items():
        compression = composed(method, more)
        if isinstance(compression, str):
            assert "\n" not in compression and any(name in compression for name in more), (part, compression)
            continue
        if compression.budget.by_head(1, 0) is not None:
            continue  # heads whose budgets the method fixes are its own test's
        ran += 1
        run = Run(compression, rows, list(LENGTHS))
        noted[:] = [run]
        sets = [[[set(range(n))] * run.heads] * 2 for n in LENGTHS]
        for number in range(STEPS + 1):
            got = run.step(number)
            for b, n in enumerate(LENGTHS):
                there = [[head | ({n + number - 1} if number else set()) for head in layer] for layer in sets[b]]
                where = f"{method}, {part}, row of {n} tokens, step {number}"
                if takes_as_many(compression):
                    sets[b] = expected(run, n + number, there)
                    assert got[b] == sets[b], where
                else:
                    sets[b] = got[b]
                    if (n + number, 0) in run.said and not compression.open:
                        mean = sum(held[b] for held in run.cache.held) / 2
                        budget = int(compression.budget.asked([n + number], [n + number], 0)[0])
                        assert mean == min(max(budget, compression.method.protected), n + number), where
    assert ran, "every method goes with something"


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_one_rectangle_keep_what_they_keep_alone(method: str, noted: list[Run]) -> None:
    """With empty slots before a row, and in heads that hold fewer than others."""
    rows = [tiny.tokens(n + STEPS, seed=n) for n in LENGTHS]
    for part in ("later cuts", "ada, later cuts", "global, later cuts", "a threshold"):
        compression = composed(method, PARTS[part])
        if isinstance(compression, str) or compression.method.hides:
            continue
        together = Run(compression, rows, list(LENGTHS))
        alone = [Run(compression, [row], [n]) for row, n in zip(rows, LENGTHS, strict=True)]
        for number in range(STEPS + 1):
            noted[:] = [together]
            got = together.step(number)
            for b, run in enumerate(alone):
                noted[:] = [run]
                assert got[b] == run.step(number)[0], f"{part}, row of {LENGTHS[b]} tokens, step {number}"

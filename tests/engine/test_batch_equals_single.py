"""A row of a left-padded batch is treated as if it were alone: same slots, same logits (fp32: 1e-4 of a logit)."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

METHODS = {
    **{
        name: {k: v for k, v in tiny.free(name, 8).items() if k not in ("max_capacity_prompt", "cache_size")}
        for name in tiny.methods(tiny.chooses)
    },
    "snapkv avg": {"method": "snapkv", "window_size": 4, "kernel_size": 5, "pooling": "avg"},
    "streaming_llm in_cache": {"method": "streaming_llm", "n_sink": 4},
    "knorm ada": {"method": "knorm", "head_budget": "ada", "alpha": 0},
}
STEPS = 8
LENGTHS = st.lists(st.integers(1, 45), min_size=2, max_size=3)
BUDGETS = st.one_of(
    st.integers(6, 24).map(lambda n: {"max_capacity_prompt": n}),
    st.sampled_from([0.3, 0.5, 0.9]).map(lambda r: {"keep_ratio": r}),
)


def run(
    pair: tiny.Pair, rows: list[list[int]], lengths: list[int], **args: object
) -> tuple[list[torch.Tensor], list[object]]:
    """Last logits [B, V] of the prefill and of every step, and the kept positions after each."""
    cache = pair.cache(**args)
    logits, positions = [], []
    for step in range(STEPS + 1):
        fed = [r[:n] if step == 0 else r[n + step - 1 : n + step] for r, n in zip(rows, lengths, strict=True)]
        starts = None if step == 0 else [n + step - 1 for n in lengths]
        logits.append(tiny.forward(pair.model, cache, fed, starts=starts)[:, -1])
        positions.append([[tiny.kept(cache, i, b) for i in range(pair.facts.num_layers)] for b in range(len(rows))])
    return logits, positions


def visible(kept: list[list[list[int]]], pair: tiny.Pair, seen: int) -> list[list[list[int]]]:
    """Of the kept positions [layer][KV head], those in sight: sliding layers drop the others many at a time."""
    out = []
    for layer, window in zip(kept, pair.facts.sliding_windows, strict=True):
        heads = [[p for p in head if window is None or p > seen - window] for head in layer]
        out.append(heads if any(h != heads[0] for h in heads) else heads[:1])  # the heads may still agree by chance
    return out


@pytest.mark.parametrize(("name", "method"), tiny.cases(METHODS))
def test_rows_of_a_batch_are_independent_of_each_other_and_of_padding(name: str, method: str) -> None:
    pair = tiny.pair(name)

    @given(LENGTHS, BUDGETS, st.sampled_from([0, 1, 3]))
    @settings(derandomize=True, deadline=None, max_examples=6, database=None, phases=[Phase.generate])
    def check(lengths: list[int], budget: dict[str, float], every: int) -> None:
        args = {**METHODS[method], **budget, "compress_every": every}
        rows = [tiny.tokens(n + STEPS, seed=i) for i, n in enumerate(lengths)]
        together, positions = run(pair, rows, lengths, **args)
        for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            alone, own_positions = run(pair, [row], [n], **args)
            for step in range(STEPS + 1):
                got = visible(positions[step][b], pair, n + step)
                assert got == visible(own_positions[step][0], pair, n + step), f"row {b}, step {step}"
                assert (together[step][b] - alone[step][0]).abs().max() <= 1e-4, f"row {b}, step {step}"

    check()


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_row_with_few_new_queries_keeps_its_older_ones(name: str) -> None:
    """The window that votes at a later cut goes back before a left-padded chunk where the row's part is short."""
    pair, lengths, more = tiny.pair(name), (30, 30), (20, 3)
    settings = {"method": "tova", "max_capacity_prompt": 12, "compress_every": 20}
    windowed = {"method": "snapkv", "window_size": 8, "kernel_size": 1, "max_capacity_prompt": 12, "compress_every": 20}
    rows = [tiny.tokens(n + m, seed=n + m) for n, m in zip(lengths, more, strict=True)]
    for values in (settings, windowed):
        together = pair.cache(**values)
        tiny.forward(pair.model, together, [r[:n] for r, n in zip(rows, lengths, strict=True)])
        together.part(more)
        for segment, n in zip(together.segments, more, strict=True):
            segment.decoded = 20 - n
        tiny.forward(pair.model, together, [r[n:] for r, n in zip(rows, lengths, strict=True)], list(lengths))
        for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            alone = pair.cache(**values)
            tiny.forward(pair.model, alone, [row[:n]])
            alone.set(decoded=20 - more[b])
            tiny.forward(pair.model, alone, [row[n:]], [n])
            for layer in range(2):
                assert tiny.kept(together, layer, b) == tiny.kept(alone, layer)

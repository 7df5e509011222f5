"""Leverage scores against their formula with an inverse, in float64, of keys before their rotation."""

from __future__ import annotations

import pytest
import tiny
import torch
from methods.plain import NAMES, Layer, choose, compare, later_cuts

from kv_lm_eval.engine.check import wrap
from kv_lm_eval.errors import UserError

CAPACITY = 14
LEVERAGE = {"method": "leverage", "max_capacity_prompt": CAPACITY}


def leverages(keys: list[list[float]], sketch: torch.Tensor | None) -> list[float]:
    """diag(X (X'X + 0.01)^-1 X') of centred keys."""
    x = torch.tensor(keys, dtype=torch.float64)
    x = x - sum(x) / len(x)
    if sketch is not None:
        x = x @ sketch
    inverse = torch.linalg.inv(sum(torch.outer(row, row) for row in x) + 0.01 * torch.eye(x.shape[1]).double())
    return [float(row @ inverse @ row) for row in x]


def sketch_of(layer: int, size: int, columns: int, seed: int = 0) -> torch.Tensor | None:
    if columns >= size:
        return None
    random = torch.Generator().manual_seed(1_000_003 * seed + layer)
    return torch.randn(size, columns, generator=random).double() / columns**0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("columns", "seed"), [(48, 0), (4, 0), (4, 7), (8, 0)])
def test_kept_tokens_are_those_of_the_formula_in_a_padded_batch(name, columns, seed):
    seen = iter(range(100))  # layers of one row after the other

    def reference(layer: Layer) -> list[set[int]]:
        sketch = sketch_of(next(seen) % 2, len(layer.pre[0][0]), columns, seed)
        return [choose(leverages(keys, sketch), CAPACITY) for keys in layer.pre]

    compare(name, {**LEVERAGE, "sketch_dimension": columns, "seed": seed}, reference)


def test_the_sketch_and_the_rotation_show():
    from methods.plain import layers

    found = layers("llama", tuple(tiny.tokens(60, seed=60)))[1]
    ways = [(found.pre, None), (found.keys, None), (found.pre, sketch_of(1, 8, 4)), (found.pre, sketch_of(1, 8, 4, 7))]
    assert len({str([sorted(choose(leverages(k, s), CAPACITY)) for k in keys]) for keys, s in ways}) == len(ways)


def test_a_sketch_is_the_same_in_every_run_and_another_by_layer():
    assert torch.equal(sketch_of(0, 8, 4), sketch_of(0, 8, 4)) and not torch.equal(
        sketch_of(0, 8, 4), sketch_of(1, 8, 4)
    )


@pytest.mark.parametrize("ada", [False, True])
@pytest.mark.parametrize("columns", [48, 4])
def test_a_later_cut_looks_at_what_is_left(columns, ada):
    sketch = sketch_of(0, 8, columns)
    wanted = {**LEVERAGE, "sketch_dimension": columns}
    later_cuts("llama", wanted, lambda layer, head, at: leverages([layer.pre[head][t] for t in at], sketch), ada)


def test_a_model_whose_keys_cannot_be_turned_back_is_refused():
    with pytest.raises(UserError, match="method=leverage on GPT2LMHeadModel: its keys cannot be moved"):
        wrap(tiny.build("gpt2"), tiny.compression(**LEVERAGE))


def test_settings_without_sense_are_refused():
    with pytest.raises(UserError, match="sketch_dimension=0"):
        tiny.compression(**LEVERAGE, sketch_dimension=0)

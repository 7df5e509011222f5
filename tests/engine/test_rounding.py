"""What counts as rounding: by the number format, and by how far a model is from itself."""

from __future__ import annotations

import pytest
import torch

from kv_lm_eval.engine.rounding import BOUND, Rounding

ONES = torch.ones(8, 5)


def asked_of(dtype: torch.dtype, off: float | None) -> Rounding:
    """Of a model that is `off` from itself; None: it must not be asked."""

    def apart() -> list[tuple[torch.Tensor, torch.Tensor]]:
        assert off is not None
        return [(ONES, ONES), (ONES, ONES * (1 + off))]

    return Rounding(dtype, apart)


@pytest.mark.parametrize("dtype", list(BOUND))
def test_within_the_bound_of_the_format_the_model_is_not_asked(dtype: torch.dtype) -> None:
    assert asked_of(dtype, None).beyond(ONES, ONES * (1 + 0.99 * BOUND[dtype])) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("own, error, passes", [(0.2, 0.39, True), (0.2, 0.41, False), (0.01, 0.11, False)])
def test_beyond_it_twice_what_the_model_is_from_itself(
    dtype: torch.dtype, own: float, error: float, passes: bool
) -> None:
    said = asked_of(dtype, own).beyond(ONES, ONES * (1 + error))
    assert (said is None) == passes, said


@pytest.mark.parametrize("own", [0.3, 0.5, 0.6, 5.0])
def test_more_than_half_is_never_rounding(own: float) -> None:
    """Such a check would tell nothing."""
    assert asked_of(torch.bfloat16, own).beyond(ONES, ONES * 1.49) is None
    for wrong in (ONES * 1.51, 0 * ONES, -ONES):
        assert asked_of(torch.bfloat16, own).beyond(ONES, wrong) is not None


@pytest.mark.parametrize("order", [1, -1])
def test_a_model_that_is_no_number_somewhere_tells_nothing(order: int) -> None:
    pairs = [(ONES, ONES * 1.2), (ONES, ONES * float("nan"))][::order]
    assert Rounding(torch.bfloat16, lambda: pairs).beyond(ONES, ONES * 1.3) is not None


def test_where_the_format_leaves_no_room_nothing_is_asked() -> None:
    assert asked_of(torch.float32, None).beyond(ONES, ONES * 1.01) is not None


def test_one_token_in_four_may_be_off_in_half_precision_only() -> None:
    got = ONES.clone()
    got[0] = 100
    assert asked_of(torch.bfloat16, None).beyond(ONES, got) is None
    assert asked_of(torch.float32, None).beyond(ONES, got) is not None


def test_what_is_no_number_is_beyond() -> None:
    got = ONES.clone()
    got[0, 0] = float("nan")
    assert "nan" in str(asked_of(torch.bfloat16, 0.2).beyond(ONES, got))
    assert "nan" in str(asked_of(torch.bfloat16, float("nan")).beyond(ONES, got))

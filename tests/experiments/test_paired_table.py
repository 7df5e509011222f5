"""A sweep's points against one of them: the same tokens in every row, differences in pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import paired_table

TOKENS, FIRST = 40, 12
TEXTS = 8


def point(more_nats: list[float], first_eviction: int | None, before: float = 0.0) -> dict[str, Any]:
    """Losses that are the same noise in every point, `more_nats` of each text higher after FIRST tokens."""
    records = {}
    for i, more in enumerate(more_nats):
        noise = np.random.default_rng(i).normal(3.0, 1.0, TOKENS)
        nll = [None, *(x + (more if at >= FIRST else before) for at, x in enumerate(noise.tolist()))][:TOKENS]
        records[f"text {i}"] = {
            "reading": {"protocol": "streaming"},
            "model": "m",
            "tokens": list(range(TOKENS)),
            "nll": nll,
            "first_eviction": first_eviction,
        }
    stats = {"kept_fraction_mean": 0.5, "kv_bytes_decode_mean": 1.0}
    return {"records": records, "stats": stats, "results": {"kv_ppl_file": {"next_token_accuracy,none": 0.4}}}


def test_all_rows_are_about_the_tokens_after_the_earliest_cut_of_any() -> None:
    mean = [0.1 + 0.01 * (i - 3.5) for i in range(TEXTS)]
    points = {
        "full": point([0.0] * TEXTS, None),
        "early": point(mean, FIRST + 1, before=5.0),
        "late": point([0.0] * TEXTS, FIRST + 9),
    }
    full, early, late = paired_table.rows(points, "full")
    assert {row["tokens"] for row in (full, early, late)} == {TEXTS * (TOKENS - FIRST - 1)}
    assert early["change_percent"] == pytest.approx(100 * math.expm1(0.1)), "what came before the cut does not count"
    spread = 2.365 * np.std(mean, ddof=1) / TEXTS**0.5  # Student's t of 7 degrees
    assert early["low_percent"] == pytest.approx(100 * math.expm1(0.1 - spread), abs=0.01)
    assert (late["change_percent"], late["low_percent"]) == (0, None)
    table = paired_table.markdown([full, early, late], "full").splitlines()
    assert "**" in table[3] and table[4].endswith("| the same, token by token |")


def test_points_of_other_texts_are_refused() -> None:
    with pytest.raises(UserError, match="different documents"):
        paired_table.rows({"a": point([0.0] * 8, 3), "b": point([0.0] * 7, 3)}, "a")

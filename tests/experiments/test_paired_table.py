"""A sweep's points against one of them: the same tokens in every row, differences in pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import paired_table
from kv_lm_eval.metrics import paired

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


def test_with_own_cuts_a_large_cache_is_not_helped_by_the_tokens_that_it_held() -> None:
    points = {
        "full": point([0.0] * TEXTS, None),
        "small": point([0.3] * TEXTS, FIRST - 8, before=0.3),
        "large": point([0.1] * TEXTS, FIRST + 1),
    }
    shared = {row["name"]: row["change_percent"] for row in paired_table.rows(points, "full")}
    own = {row["name"]: row for row in paired_table.by_own_cut(points, "full")}
    assert own["large"]["change_percent"] == pytest.approx(100 * math.expm1(0.1))
    assert shared["large"] < own["large"]["change_percent"] / 1.2
    assert (own["small"]["tokens"], own["large"]["tokens"]) == (
        TEXTS * (TOKENS - FIRST + 8),
        TEXTS * (TOKENS - FIRST - 1),
    )
    assert own["small"]["change_percent"] == pytest.approx(shared["small"])


def test_points_of_other_texts_are_refused() -> None:
    with pytest.raises(UserError, match="different documents"):
        paired_table.rows({"a": point([0.0] * 8, 3), "b": point([0.0] * 7, 3)}, "a")


def test_kl_is_of_the_same_tokens_as_the_loss_and_survives_the_reading(tmp_path: Path) -> None:
    points = {"full": point([0.0] * TEXTS, None), "cut": point([0.1] * TEXTS, FIRST + 1)}
    for name, kl in (("full", 0.0), ("cut", 0.25)):
        for record in points[name]["records"].values():
            record["kl"] = [None] + [9.0 * (kl > 0)] * FIRST + [kl] * (TOKENS - FIRST - 1)
        lines = [json.dumps({"document": text, **record}) for text, record in points[name]["records"].items()]
        (tmp_path / name).write_text("\n".join(lines))
        points[name]["records"] = paired.read(tmp_path / name)
    full, cut = paired_table.rows(points, "full")
    assert (full["kl"], cut["kl"], cut["kl_more"]) == (0, 0.25, 0.25), "the 9.0 before the cut do not count"
    assert "| 0.2500 | 0.2500 to 0.2500 | +10.5" in paired_table.markdown([full, cut], "full")
    paired_table.draw_pareto([full, cut], "", tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 5000


def test_a_divergence_of_rounding_is_not_drawn() -> None:
    table = [
        {"name": n, "bytes": b, "kl": kl}
        for n, b, kl in (("full", 8.0, 6e-12), ("cut", 2.0, 0.3), ("8 bits", 4.0, 1e-5))
    ]
    assert paired_table.dots_of(table) == [(25.0, 0.3, "cut"), (50.0, 1e-5, "8 bits")]


def test_a_picture_against_bytes_needs_kl(tmp_path: Path) -> None:
    table = paired_table.rows({"full": point([0.0] * TEXTS, None)}, "full")
    with pytest.raises(UserError, match="full has none: run it with fidelity=True"):
        paired_table.draw_pareto(table, "", tmp_path / "pareto.png")


def test_points_that_differ_behind_the_last_comma_are_one_method_at_several_budgets() -> None:
    names = ["full cache", "snapkv, 26", "h2o, 26", "random, one draw", "snapkv, 51", "a, b, 26", "a, b, 51"]
    assert paired_table.budgets_of(names) == {"snapkv": ["snapkv, 26", "snapkv, 51"], "a, b": ["a, b, 26", "a, b, 51"]}

"""Perplexity by place in the text, against means that are written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import by_position


def point(*texts: list[float | None]) -> dict[str, Any]:
    asked = {"model": "m", "reading": {"protocol": "stream"}, "first_eviction": None}
    each = {f"t{i}": {"nll": nll, "tokens": [*range(len(nll))], **asked} for i, nll in enumerate(texts)}
    return {"records": each}


def test_stretches_are_means_of_all_tokens_in_them_whatever_text_they_are_of() -> None:
    draw = np.random.default_rng(0)
    long, short = draw.random(90).tolist(), draw.random(40).tolist()
    worse = [v + 0.5 for v in long], [v + 0.25 for v in short]
    points = {"full": point([None, *long[1:]], short), "cut": point([None, *worse[0][1:]], worse[1])}
    table = by_position.rows(points, [0, 30, 90], points["full"])
    first, second, cut_first, cut_second = table
    assert first["tokens"] == 59 and second["tokens"] == 70
    assert first["perplexity"] == pytest.approx(np.exp(np.mean([*long[1:30], *short[:30]])))
    assert second["perplexity"] == pytest.approx(np.exp(np.mean([*long[30:], *short[30:]])))
    more = (0.5 * 29 + 0.25 * 30) / 59, (0.5 * 60 + 0.25 * 10) / 70
    for row, nats in zip((cut_first, cut_second), more, strict=True):
        assert row["change_percent"] == pytest.approx(100 * (np.exp(nats) - 1))
    assert first["low_percent"] is None, "a point beside itself has no interval"
    assert by_position.markdown(table).splitlines()[0] == "| tokens | 0 to 30 | 30 to 90 |"
    assert len(by_position.as_csv(table).splitlines()) == 5


@pytest.mark.parametrize("edges", [[5], [9, 9], [-1, 4], [0, 200, 100]])
def test_edges_that_make_no_stretch_are_refused(edges: list[int]) -> None:
    with pytest.raises(UserError, match="--edges"):
        by_position.rows({"a": point([1.0] * 50)}, edges)


def test_every_text_reaches_into_every_stretch() -> None:
    """Or a column would be about other texts than the one before it."""
    for texts in ([[1.0] * 50], [[3.0] * 400, [1.0] * 50]):
        with pytest.raises(UserError, match="no scored token of t. from 50 to 60; of its 50 tokens 50 were scored"):
            by_position.rows({"a": point(*texts)}, [0, 50, 60])


def test_texts_are_paired_by_name() -> None:
    draw = np.random.default_rng(1)
    texts = [draw.normal(3, 1, n).tolist() for n in (60, 50, 90)]
    full, cut = point(*texts), point(*([v + 0.1 for v in text] for text in texts))
    cut["records"] = dict(reversed(cut["records"].items()))
    _, row = by_position.rows({"full": full, "cut": cut}, [0, 45], full)
    assert row["change_percent"] == pytest.approx(100 * (np.exp(0.1) - 1))
    assert row["high_percent"] == pytest.approx(row["low_percent"], abs=1e-6)


@pytest.mark.parametrize(
    "other", [[1.0] * 30, [*[1.0] * 20, *[None] * 20]], ids=["another length", "nothing scored in common"]
)
def test_points_that_scored_other_tokens_are_refused(other: list[float | None]) -> None:
    full = point([*[None] * 20, *[1.0] * 20])
    with pytest.raises(UserError, match="have not scored the same tokens|no scored token"):
        by_position.rows({"full": full, "cut": point(other)}, [20, 40], full)


def test_the_picture(tmp_path: Path) -> None:
    by_position.draw({"a": point([1.0] * 700, [2.0] * 30)}, [0, 1000], "", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000

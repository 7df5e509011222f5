"""A scorer that reads what it does not declare is told what to declare, in one line; so is one of another shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from kv_lm_eval.errors import UserError

SCORER = """
import torch
from kv_lm_eval.methods.base import Method

class Mine(Method):
{declared}
    def score(self, view):
        {score}
"""
READS = {  # what score() does, what is missing, and what the message must name
    "attention": ("return view.attention(4).sum((2, 3))", "", ["view.attention(4)", "num_queries", "returns 4"]),
    "more attention than declared": (
        "return view.attention(4).sum((2, 3))",
        "    num_queries = 2",
        ["last 4 queries", "keeps 2", "num_queries"],
    ),
    "mass": ("return view.mass", "", ["view.mass", "accumulates = True"]),
    "moments": ("return view.moments.mean", "", ["view.moments", "moments_from"]),
    "rotate": ("return view.rotate(view.keys, -view.pos).sum(-1)", "", ["view.rotate", "moments_from"]),
    "shape": ("return view.keys.sum(-1)[:, 0]", "", ["shape [1, 40]", "[1, 2, 40]", "[1, 1, 40]"]),
    "number of heads": ("return view.keys.sum(-1).repeat(1, 2, 1)", "", ["shape [1, 4, 40]"]),
    "not a number": ("return view.keys.sum(-1) / 0 * 0", "", ["NaN", "layer 0"]),
}


def run(folder: Path, score: str, declared: str) -> None:
    path = folder / "mine.py"
    path.write_text(SCORER.format(score=score, declared=declared))
    pair = tiny.pair("llama")
    cache = pair.cache(method=str(path), max_capacity_prompt=12)
    tiny.forward(pair.model, cache, [tiny.tokens(40)])


@pytest.mark.parametrize("case", READS)
def test_what_a_scorer_reads_without_declaring_it_is_named(case: str, tmp_path: Path) -> None:
    score, declared, words = READS[case]
    with pytest.raises(UserError) as caught:
        run(tmp_path, score, declared)
    assert all(word in str(caught.value) for word in ["method=mine", *words]), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("score", "declared"),
    [
        ("return view.attention(4).sum((2, 3))", "    num_queries = 4"),
        ("return view.attention(2).sum((2, 3))", "    num_queries = 4"),
        ("return view.mass", "    accumulates = True"),
        ("return view.rotate(view.keys, -view.pos).sum(-1)", "    moments_from = 0"),
    ],
)
def test_what_is_declared_is_there(score: str, declared: str, tmp_path: Path) -> None:
    run(tmp_path, score, declared)


def test_a_score_of_an_empty_slot_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        SCORER.format(
            declared="",
            score="return view.keys.sum(-1).masked_fill(view.pos < 0, float('nan')).expand_as(view.keys[..., 0])",
        )
    )
    pair = tiny.pair("llama")
    cache = pair.cache(method=str(path), max_capacity_prompt=12)
    tiny.forward(pair.model, cache, [tiny.tokens(40), tiny.tokens(3), tiny.tokens(20)])
    assert cache.held == [[12, 3, 12]] * 2

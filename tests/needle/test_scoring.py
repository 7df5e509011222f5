"""Each score at its edges, against its reference's formula, and the mean of a cell."""

from __future__ import annotations

import pytest

from kv_lm_eval.errors import OUT_OF_MEMORY
from kv_lm_eval.tasks.needle import scoring

SANDWICH = "eat a sandwich and sit in Dolores Park on a sunny day."


@pytest.mark.parametrize(
    ("answer", "expected", "share", "any_", "every"),
    [
        ("12345", ["12345"], 1, 1, 1),
        (" It is 12345.", ["12345"], 1, 1, 1),
        ("", ["12345"], 0, 0, 0),
        ("1234", ["12345"], 0, 0, 0),
        ("FIGS and Goat Cheese", ["figs", "prosciutto", "goat cheese"], 2 / 3, 1, 0),
        ("a\x00b", ["a\nb"], 1, 1, 1),  # RULER turns control characters into line breaks
        ("goat  cheese", ["goat cheese"], 0, 0, 0),
    ],
)
def test_contains(answer, expected, share, any_, every):
    assert scoring.contains(answer, expected) == pytest.approx(share)
    assert scoring.contains_any(answer, expected) == any_
    assert scoring.contains_every(answer, expected) == every


@pytest.mark.parametrize(
    ("answer", "score"), [("12345", 1), (" 12345. ", 1), ("'12345'", 1), ("12345 6", 0), ("is 12345", 0), ("", 0)]
)
def test_exact(answer, score):
    assert scoring.exact(answer, ["12345"]) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (SANDWICH, 1),
        (SANDWICH.upper(), 1),
        ("Sit in Dolores Park on a sunny day. And eat a sandwich!", 10 / 11),  # "sandwich!" is another word
        (SANDWICH.rstrip("."), 10 / 11),  # so is "day"
        ("a a a and in on", 4 / 11),  # stop words alone
        ("", 0),
    ],
)
def test_recall_words_is_the_heat_map_score_of_kvcache_factory(answer, score):
    theirs = len(set(answer.lower().split()).intersection(set(SANDWICH.lower().split()))) / len(
        set(SANDWICH.lower().split())
    )
    assert scoring.recall_words(answer, SANDWICH) == pytest.approx(score) == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (SANDWICH, 1),
        ("Sit in Dolores Park, on a sunny day; eat a sandwich!", 1),
        ("a a a and in on", 0),
        ("Dolores Park", 2 / 7),  # eat sandwich sit dolores park sunny day
    ],
)
def test_recall_content_words(answer, score):
    assert scoring.recall_content_words(answer, SANDWICH) == pytest.approx(score)


def test_content_words_of_a_reference_without_any_are_all_its_words():
    assert scoring.recall_content_words("to be", "to be or not") == pytest.approx(2 / 4)


def test_rouge1_recall_does_not_punish_length_and_f_does():
    long = SANDWICH + " Or else one may go and see a museum, a bridge, and the sea lions of the harbour."
    assert scoring.rouge1_recall(SANDWICH, SANDWICH) == scoring.rouge1_f(SANDWICH, SANDWICH) == 1
    assert scoring.rouge1_recall(long, SANDWICH) == 1
    assert scoring.rouge1_f(long, SANDWICH) == pytest.approx(2 * 12 / (12 + 30))
    assert scoring.rouge1_recall("eating sandwiches", SANDWICH) == pytest.approx(2 / 12)  # stemmed
    assert scoring.rouge1_f("", SANDWICH) == scoring.rouge1_recall("", SANDWICH) == 0


def doc(depth=50, length=512, removed=False, **other) -> dict:
    return {
        "expected": ["12345"],
        "reference": "12345",
        "rouge_reference": "12345",
        "scores": ["contains", "exact"],
        "context_length": length,
        "document_depth_percent": depth,
        "length_tokens": length - 48,
        "needle_removed": removed,
        **other,
    }


def test_an_answer_gives_its_documents_scores_and_its_cell():
    got = scoring.process(doc(), [" 12345."])
    assert (got["contains"], got["exact"], got["cells"]["failed"]) == (1, 1, None)
    assert set(got) == {"contains", "exact", "cells"}


def test_a_prompt_without_its_needle_counts_for_the_floor_alone():
    assert set(scoring.process(doc(removed=True), ["12345"])) == {"floor", "cells"}


def test_an_answer_out_of_memory_is_counted_and_never_zero():
    got = scoring.process(doc(), [OUT_OF_MEMORY])
    assert set(got) == {"cells"} and got["cells"]["scores"] == {}


def test_the_grid_is_the_mean_of_each_cell_in_order_with_failures_apart():
    answers = [
        *((doc(depth, length), "12345" if depth else "no") for length in (1024, 512) for depth in (50, 0)),
        (doc(50, 512), "no"),
        (doc(50, 512), OUT_OF_MEMORY),
        (doc(50, 512, removed=True), "12345"),
        (doc(0, 1024, removed=True), OUT_OF_MEMORY),
        (doc(100, 1024), OUT_OF_MEMORY),
    ]
    cells = scoring.grid([scoring.process(d, [a])["cells"] for d, a in answers])
    assert [(c["context_length"], c["document_depth_percent"], c["samples"]) for c in cells] == [
        (512, 0, 1),
        (512, 50, 2),
        (1024, 0, 1),
        (1024, 50, 1),
        (1024, 100, 0),
    ]
    assert [c["scores"].get("contains") for c in cells] == [0, 0.5, 0, 1, None]
    assert [c["failed"] for c in cells] == [{}, {"OOM": 1}, {}, {}, {"OOM": 1}]
    assert [c["floor"] for c in cells] == [None, 1, None, None, None]
    assert str(cells) == "5 cells"


def test_tasks_without_depth_have_one_row():
    cells = scoring.grid([scoring.process(doc(depth=None), ["12345"])["cells"]])
    assert cells[0]["document_depth_percent"] is None

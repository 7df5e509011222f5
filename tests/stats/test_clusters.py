"""Which documents are one observation, from what they say; and the rate of false alarms where methods are equal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kv_lm_eval.reporting import load, rows
from kv_lm_eval.stats import paired
from kv_lm_eval.stats.clusters import label, texts_of
from kv_lm_eval.tasks.needle import tasks as needle_tasks

sys.path.insert(0, str(Path(__file__).parents[1] / "reporting"))
import results  # noqa: E402

MEAN = paired.AGGREGATIONS[0]
STORY = "The ferry had not come for three days, and nobody in the harbour knew why. " * 4
OTHER = "Gulls walked on the stones while the boats lay still and the nets dried. " * 4


def groups(*docs: dict[str, Any]) -> list[int]:
    return label([[texts_of(doc, str(i)) for i, doc in enumerate(docs)]])[0].tolist()


@pytest.mark.parametrize(
    "field", ["context", "passage", "article", "document", "story", "paragraphs", "premise", "text"]
)
@pytest.mark.parametrize("value", ["short", STORY, [STORY, OTHER], {"title": ["a"], "sentences": [["b", "c"]]}])
def test_documents_about_one_text_belong_together_whatever_it_is_called(field: str, value: Any) -> None:
    assert groups({field: value, "q": 1}, {field: "another", "q": 2}, {field: value, "q": 3}) == [0, 1, 0]


def test_a_long_text_of_any_name_is_a_text_but_what_most_documents_have_is_an_instruction() -> None:
    assert groups({"input": STORY}, {"input": OTHER}, {"input": STORY}, {"input": "x"}, {"input": "x"}) == [
        0,
        1,
        0,
        2,
        3,
    ]
    told = [{"instruction": STORY, "question": i} for i in range(5)]
    assert groups(*told) == [0, 1, 2, 3, 4]


def test_what_says_nothing_joins_nothing() -> None:
    plain = [
        {"question": i, "choices": ["a", "b"], "context": "", "passages": [], "page": 3, "gold": 1} for i in range(4)
    ]
    assert groups(*plain) == [0, 1, 2, 3] == groups({}, {}, {}, {})
    assert label([[texts_of(None, "x"), texts_of(None, "y"), texts_of(None, "x")]])[0].tolist() == [0, 1, 0]
    assert groups({"passage_id": 7}, {"passage_id": 8}, {"passage_id": 7}) == [0, 1, 0]


def test_the_tasks_own_word_comes_first_and_texts_are_known_across_tasks() -> None:
    assert groups({"cluster": "a", "context": STORY}, {"cluster": "b", "context": STORY}, {"cluster": "a"}) == [0, 1, 0]
    one, two = label([[texts_of({"context": c}, c) for c in "abc"], [texts_of({"context": c}, c) for c in "cad"]])
    assert (one.tolist(), two.tolist()) == ([0, 1, 2], [2, 0, 3])
    bridge = [{"context": STORY}, {"context": STORY, "text": OTHER}, {"text": OTHER}]
    assert groups(*bridge) == [0, 0, 0]


def test_all_depths_of_a_needle_share_their_filler_and_nothing_else_does() -> None:
    metadata = {"pretrained": "kv-tiny", "lengths": [256, 300], "depths": [0, 50, 100], "samples_per_cell": 2}
    for build in (needle_tasks.magic, needle_tasks.multikey, needle_tasks.vt):
        docs = list(build(**metadata)["test"])
        expected = [(doc["context_length"], doc["sample"]) for doc in docs]
        names = list(dict.fromkeys(expected))
        assert groups(*docs) == [names.index(e) for e in expected] and len(names) == 4
    own = list(needle_tasks.multikey(**metadata, haystack="needles")["test"])
    assert len(set(groups(*own))) == len(own), "a filler of its own for each prompt"


# ---------------------------------------------------------------------------------------------- false alarms


def null_scores(rng: np.random.Generator, of_document: np.ndarray, shared: float) -> np.ndarray:
    """Scores of two equal methods, [2, n]: right or wrong 70 to 30; a share of documents does as their text does."""
    clusters = of_document.max() + 1
    own, text = (rng.random((2, k)) < 0.7 for k in (len(of_document), clusters))
    return np.where(rng.random(len(of_document)) < shared, text[:, of_document], own).astype(float)


SHAPES = {
    "needles: 5 depths of 15 fillers": np.repeat(np.arange(15), 5),
    "1 to 9 questions on each of 24 texts": np.repeat(np.arange(24), [1 + (5 * i) % 9 for i in range(24)]),
    "windows of 12 texts": np.repeat(np.arange(12), 8),
}


def outside(of_document: np.ndarray, told: bool, shared: float, repeats: int = 1000, noise: bool = False) -> float:
    """Share of comparisons of equal methods that are called outside noise."""
    rng, out = np.random.default_rng(8), 0
    docs = [{"context": f"text {c}" if told else f"text {i}"} for i, c in enumerate(of_document)]
    (clusters,) = label([[texts_of(doc, str(i)) for i, doc in enumerate(docs)]])
    for _ in range(repeats):
        if noise:
            own, text = rng.normal(size=len(of_document)), rng.normal(size=of_document.max() + 1)
            ours, base = np.sqrt(1 - shared) * own + np.sqrt(shared) * text[of_document], np.zeros(len(of_document))
        else:
            ours, base = null_scores(rng, of_document, shared)
        pair = paired.Pair(MEAN.table(ours.tolist()), MEAN.table(base.tolist()), MEAN, clusters)
        out += paired.compare([pair]).verdict == "outside noise"
    return out / repeats


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "DRAWS", 400)
    monkeypatch.setattr(paired, "MIN_DRAWS", 400)


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_methods_are_told_apart_one_time_in_twenty_however_much_is_shared(shape: str, shared: float) -> None:
    assert 0.03 <= outside(SHAPES[shape], True, shared, noise=True) <= 0.07
    assert 0.01 <= outside(SHAPES[shape], True, shared) <= 0.07  # right and wrong are coarse: fewer where few differ


def test_documents_taken_for_independent_would_be_wrong_a_third_of_the_time() -> None:
    assert outside(SHAPES["needles: 5 depths of 15 fillers"], False, 1.0, 100) > 0.3


def test_a_real_difference_is_found() -> None:
    rng, of_document = np.random.default_rng(9), SHAPES["needles: 5 depths of 15 fillers"]
    found = 0
    for _ in range(50):
        base, worse = null_scores(rng, of_document, 0.5)
        worse = worse * (rng.random(len(worse)) < 0.4)
        pair = paired.Pair(MEAN.table(worse.tolist()), MEAN.table(base.tolist()), MEAN, of_document)
        found += paired.compare([pair]).verdict == "outside noise"
    assert found >= 45


# ---------------------------------------------------------------------------------------------- from files


def test_a_report_knows_the_texts_from_the_samples(tmp_path: Path) -> None:
    docs = [{"passage": f"{i // 5}: {STORY}"} for i in range(40)]
    full, ours = [1.0] * 40, [float(i // 5 not in (2, 3, 6)) for i in range(40)]  # three texts are lost, nothing else
    results.run(tmp_path / "a", results.FULL, {"task": results.mean_task(full, extra=docs)})
    results.run(tmp_path / "b", results.snapkv(), {"task": results.mean_task(ours, extra=docs)}, date=2)
    runs, notes = load.read(tmp_path)
    report = rows.report(runs, notes)
    cell = next(row for row in report.rows if row.first.method == "snapkv").cells[report.columns[0]]
    assert cell.comparison is not None
    assert (cell.comparison.documents, cell.comparison.clusters) == (40, 8)
    assert cell.comparison.verdict == "within noise", "three of eight texts"
    assert cell.stderr == pytest.approx(np.std([0, 0, 0, 1, 1, 1, 1, 1], ddof=1) / 8**0.5)

"""Every score is the official one to the last bit."""

import random

import pytest
from longbench.golden import OFFICIAL, OWN, needs_official, read_jsonl

from kv_lm_eval.errors import UserError
from kv_lm_eval.tasks.longbench_tasks import metrics
from kv_lm_eval.tasks.longbench_tasks.metrics import code_sim, code_sim_levenshtein, rouge
from kv_lm_eval.tasks.longbench_tasks.scoring import best_score, first_line
from kv_lm_eval.tasks.longbench_tasks.specs import official


def differences(rows):
    specs = official()
    for row in rows:
        spec = specs[row["dataset"]]
        scorer = metrics.load(spec.metric)
        score = best_score(scorer, row["pred"], row["answers"], row["all_classes"], spec.first_line_only)
        if score != row["official_score"]:
            yield row.get("id", row), score, row["official_score"]


def test_own_golden_cases_are_bit_equal():
    rows = read_jsonl(OWN / "scores.jsonl")
    assert len(rows) == 168
    assert {row["dataset"] for row in rows} == set(official())
    assert list(differences(rows)) == []


@needs_official
def test_official_golden_cases_are_bit_equal():
    rows = [row for file in sorted(OFFICIAL.glob("golden/*.jsonl")) for row in read_jsonl(file)]
    assert len(rows) == 1434
    assert list(differences(rows)) == []


def slow_lcs_words(ref, hyp):
    """The table and the tie rule of `rouge` 1.0.1, as written there; also the number of nested calls."""
    table = [[0] * (len(hyp) + 1) for _ in range(len(ref) + 1)]
    for i, x in enumerate(ref, 1):
        for j, y in enumerate(hyp, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    i, j, calls, found = len(ref), len(hyp), 1, set()
    while i and j:
        calls += 1
        if ref[i - 1] == hyp[j - 1]:
            found.add(ref[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found, calls


def test_bit_vectors_trace_the_same_words_in_as_many_calls():
    draw = random.Random(3)
    for _ in range(400):
        ref, hyp = ([draw.choice("abcdefg") for _ in range(draw.randint(1, 30))] for _ in range(2))
        found, calls = slow_lcs_words(ref, hyp)
        places = rouge._positions(hyp)
        assert rouge._traced_words(ref, hyp, places, calls) == found
        assert rouge._traced_words(ref, hyp, places, calls - 1) is None


def test_rouge_reads_blank_pieces_as_an_empty_word():
    """So stripping a prediction changes its score."""
    assert round(rouge.score("a b. ", "a b."), 6) == 0.8
    assert round(rouge.score("a b. ", "a b. "), 6) == 1.0
    assert rouge.score("a b.", "a b.") == 2.0 * (1.0 / (2.0 + 1e-8)) < 1
    assert rouge.score("", "a") == rouge.score("...", "a") == rouge.score("a", "") == 0.0


def test_rouge_scores_zero_where_the_package_would_recurse_too_deep():
    def words(n):
        return " ".join(f"w{i}" for i in range(n))

    assert rouge.score(words(990), words(990)) == pytest.approx(1)  # 991 calls
    assert rouge.score(words(991), words(991)) == 0.0
    rouge_zh = metrics.load("rouge_zh")
    assert rouge.rouge_l(words(990), words(990), 990) == 0.0
    assert rouge_zh("好", "好") == pytest.approx(1)


def test_a_line_ends_at_a_newline_and_at_nothing_else():
    assert first_line("\n\n a \u2028b\r c\nd") == " a \u2028b\r c"


def test_code_sim_keeps_indentation_and_takes_a_blank_line():
    assert code_sim.first_line_of_code("\n# no\n  x\n") == "  x"
    assert code_sim.score("# c\n\nreturn x", "return x") == 0.0
    assert code_sim.score("", "") == 1.0


def test_code_sim_is_difflib_whatever_is_installed():
    reference = "\t\t\t\tString label = example.getValueAsString(predictionAttribute);"
    prediction = "\t\t\t\tAttribute predictedLabel = currentResultSet.getAttributes().getPredictedLabel();"
    assert code_sim.score(prediction, reference) < code_sim_levenshtein.score(prediction, reference)
    assert code_sim.score("cadb", "abc") == 0.29
    assert code_sim_levenshtein.score("cadb", "abc") == 0.57


def test_classification_keeps_its_quirk():
    """Of two names within the right one, the second is skipped when the first is removed."""
    assert metrics.load("classification")("ABC", "AB", ["A", "AB", "ABC"]) == pytest.approx(0.5)
    assert metrics.load("classification")("abc", "abc", ["a", "b", "abc"]) == pytest.approx(0.5)


def test_other_digits_are_numbers_but_never_the_right_one():
    assert metrics.load("count")("１５ or 15", "15") == 0.5  # noqa: RUF001


def test_the_best_reference_counts_and_no_reference_is_zero():
    qa_f1 = metrics.load("qa_f1")
    assert best_score(qa_f1, "The cat", ["dog", "a cat!"], None, False) == 1.0
    assert best_score(qa_f1, "cat", [], None, False) == 0.0


def test_unknown_metric_names_its_neighbours():
    with pytest.raises(UserError, match="did you mean 'rouge'"):
        metrics.load("rogue")
    assert metrics.load("kv_lm_eval.tasks.longbench_tasks.metrics.count:share")("1 2", "1") == 0.5

"""The decisions of tune.py on simulated scores, where the truth is known."""

from __future__ import annotations

from math import ceil, log

import numpy as np
import pytest

from kv_lm_eval.experiments import search
from kv_lm_eval.stats import betting

TOLERANCE = 0.05


def draw(rng: np.random.Generator, mean: float, n: int, noise: float = 0.1) -> np.ndarray:
    """Paired losses of 0/1 scores: the setting fails where full is right, and now and then the other way round."""
    worse, better = mean + noise, noise
    u = rng.random(n)
    return np.where(u < worse, 1.0, np.where(u < worse + better, -1.0, 0.0))


def searched(rng, truth, documents=2000, confidence=0.95, first_look=32, noise=0.02):
    """truth[budget][variant] is the true mean loss; documents are shared, as in a real run."""
    losses = {(b, v): draw(rng, mean, documents, noise) for b, row in enumerate(truth) for v, mean in enumerate(row)}
    budgets = [[(b, v) for v in range(len(row))] for b, row in enumerate(truth)]
    asked: list[int] = []

    def look(candidate, n):
        asked.append(n)
        return losses[candidate][:n]

    return search.search(budgets, look, documents, TOLERANCE, confidence, first_look), asked


def test_log_capital_is_the_plain_product() -> None:
    losses = [0.0, 1.0, -1.0, 0.25, 0.0]
    capitals = []
    for share in betting.SHARES:
        capital, stake = 1.0, share / (1 - 0.1)
        for loss in losses:
            capital *= 1 + stake * (0.1 - loss)
        capitals.append(capital)
    assert betting.evidence_within(losses, 0.1) == pytest.approx(log(sum(capitals) / len(capitals)), abs=1e-12)
    mirrored = [-x for x in losses]
    assert betting.evidence_outside(losses, 0.1) == pytest.approx(betting.evidence_within(mirrored, -0.1), abs=1e-12)


@pytest.mark.parametrize("mean", [TOLERANCE, 0.08])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_looking_after_every_document_does_not_make_errors_more_frequent(mean: float, noise: float) -> None:
    rng = np.random.default_rng(1)
    alpha, wrong, repeats, n = 0.1, 0, 400, 400
    stakes = betting.SHARES / (1 - TOLERANCE)
    for _ in range(repeats):
        logs = np.log(1 + stakes[:, None] * (TOLERANCE - draw(rng, mean, n, noise)[None, :])).cumsum(1)
        capital = np.logaddexp.reduce(logs, axis=0) - log(len(stakes))
        wrong += bool((capital >= -log(alpha)).any())
    assert wrong <= alpha * repeats + 3 * (alpha * (1 - alpha) * repeats) ** 0.5


def test_a_search_over_many_bad_settings_rarely_recommends_one() -> None:
    rng = np.random.default_rng(2)
    truth = [[TOLERANCE + 0.005] * 4] * 5
    recommended = sum(searched(rng, truth, 800, confidence=0.9)[0].best is not None for _ in range(100))
    assert recommended <= 10 + 3 * 3


def by_text(rng: np.random.Generator, mean: float, texts: int, shared: float, size: int = 5) -> np.ndarray:
    """[texts, size] losses of documents, a share of which are their text's."""
    own, text = draw(rng, mean, texts * size, 0.1).reshape(texts, size), draw(rng, mean, texts, 0.1)
    return np.where(rng.random((texts, size)) < shared, text[:, None], own)


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_no_answer_of_several_is_wrong_more_often_than_it_says_however_much_texts_share(shared: float) -> None:
    """Four tasks and their mean, three budgets, each a little outside the tolerance: any recommendation is wrong."""
    rng, wrong, repeats, confidence = np.random.default_rng(11), 0, 60, 0.8
    for _ in range(repeats):
        seen = [[by_text(rng, TOLERANCE + 0.001, 200, shared) for _ in range(3)] for _ in range(4)]
        answers = []
        for tasks in ([0], [1], [2], [3], [0, 1, 2, 3]):
            losses = [np.mean([seen[t][b].mean(axis=1) for t in tasks], axis=0) for b in range(3)]
            budgets = [[b] for b in range(3)]
            answers.append(
                search.search(budgets, lambda b, n, of=losses: of[b][:n], 200, TOLERANCE, confidence, 32, 5).best
            )
        wrong += any(answer is not None for answer in answers)
    assert wrong / repeats <= 0.2 + 3 * (0.2 * 0.8 / repeats) ** 0.5


def test_documents_of_one_text_taken_for_independent_ones_would_be_wrong_far_more_often() -> None:
    rng, told, untold, alpha = np.random.default_rng(12), 0, 0, 0.05
    for _ in range(200):
        losses = by_text(rng, TOLERANCE + 0.001, 100, 1.0, 20)
        told += betting.evidence_within(losses.mean(axis=1), TOLERANCE) >= -log(alpha)
        untold += betting.evidence_within(losses.ravel(), TOLERANCE) >= -log(alpha)
    assert told <= 0.05 * 200 + 6 and untold > 0.2 * 200


def test_texts_of_unequal_size_are_weighted() -> None:
    """The mean over documents, with the guarantee; a text of one document moves the capital less."""
    rng, alpha, wrong = np.random.default_rng(13), 0.1, 0
    for _ in range(300):
        sizes = rng.choice([1, 10], 200)
        means = np.where(sizes == 10, 0.11, -0.5)  # large texts lose: 0.055 a document, -0.2 a text
        losses = np.where(rng.random(200) < abs(means), np.sign(means), 0.0)
        truth = (10 * 0.11 - 0.5) / 11
        rows = np.stack([losses * sizes / 10, sizes / 10], axis=1)
        wrong += betting.evidence_within(rows, truth - 0.002) >= -log(alpha)
    assert wrong <= 0.1 * 300 + 3 * 5.2
    assert betting.mean([[0.5, 1.0], [-0.1, 0.1]]) == pytest.approx(0.4 / 1.1)
    even = np.stack([losses, np.ones(200)], axis=1)
    assert betting.evidence_within(even, 0.1) == betting.evidence_within(losses, 0.1)


def test_smallest_budget_that_is_good_enough_is_found() -> None:
    rng = np.random.default_rng(3)
    truth = [[0.8], [0.4], [0.15], [0.0], [0.0], [0.0]]
    found = [searched(rng, truth)[0].best for _ in range(30)]
    assert all(best is not None for best in found)
    budgets = [best.candidate[0] for best in found]
    assert min(budgets) == 3 and budgets.count(3) >= 27


def test_best_variant_of_a_budget_survives_the_halving() -> None:
    rng = np.random.default_rng(4)
    truth = [[0.5, 0.3, 0.0, 0.4, 0.6, 0.3]]
    found = [searched(rng, truth)[0].best for _ in range(20)]
    assert [best.candidate for best in found] == [(0, 2)] * 20


def test_none_within_tolerance_is_shown_with_few_documents() -> None:
    answer, asked = searched(np.random.default_rng(5), [[0.9], [0.6], [0.5]])
    assert answer.best is None
    assert {v.decision for v in answer.verdicts} == {search.OUTSIDE}
    assert max(asked) <= 64


def test_too_few_documents_prove_nothing_even_without_a_difference() -> None:
    answer, _ = searched(np.random.default_rng(6), [[0.0]], documents=40, noise=0.0)
    assert answer.best is None and answer.verdicts[0].decision == search.UNDECIDED
    assert answer.verdicts[0].mean_loss == 0 and answer.verdicts[0].at_most > TOLERANCE


def test_fewest_documents_is_near_the_binomial_limit() -> None:
    """With losses of 0 or 1, n documents without a loss exclude a mean of t only if (1 - t)^n <= alpha."""
    for tolerance, alpha in ((0.05, 0.05), (0.02, 0.05 / 24), (0.2, 0.01)):
        limit = ceil(log(alpha) / log(1 - tolerance))
        n = betting.fewest(tolerance, alpha)
        assert limit <= n <= 1.6 * limit
        assert betting.evidence_within(np.zeros(n), tolerance) >= -log(alpha)


def test_upper_bound_covers_the_truth() -> None:
    rng = np.random.default_rng(7)
    missed = sum(betting.upper_bound(draw(rng, 0.1, 150, 0.1), 0.1) < 0.1 for _ in range(200))
    assert missed <= 20 + 3 * 4.3


def test_looks_double_and_end_with_all_documents() -> None:
    assert search.looks(32, 200) == [32, 64, 128, 200]
    assert search.looks(32, 20) == [20]

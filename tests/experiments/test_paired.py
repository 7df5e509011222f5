"""The decisions of tune.py on simulated scores, where the truth is known."""

from __future__ import annotations

from math import ceil, log

import numpy as np
import pytest

from kv_lm_eval.experiments import paired

TOLERANCE = 0.05


def draw(rng: np.random.Generator, mean: float, n: int, noise: float = 0.1) -> np.ndarray:
    """Paired losses of 0/1 scores: the setting fails where full is right, and now and then the other way round."""
    worse, better = mean + noise, noise
    u = rng.random(n)
    return np.where(u < worse, 1.0, np.where(u < worse + better, -1.0, 0.0))


def search(rng, truth, documents=2000, confidence=0.95, first_look=32, noise=0.02):
    """truth[budget][variant] is the true mean loss; documents are shared, as in a real run."""
    losses = {(b, v): draw(rng, mean, documents, noise) for b, row in enumerate(truth) for v, mean in enumerate(row)}
    budgets = [[(b, v) for v in range(len(row))] for b, row in enumerate(truth)]
    asked: list[int] = []

    def look(candidate, n):
        asked.append(n)
        return losses[candidate][:n]

    return paired.search(budgets, look, documents, TOLERANCE, confidence, first_look), asked


def test_log_capital_is_the_plain_product() -> None:
    losses = [0.0, 1.0, -1.0, 0.25, 0.0]
    capitals = []
    for share in paired.SHARES:
        capital, stake = 1.0, share / (1 - 0.1)
        for loss in losses:
            capital *= 1 + stake * (0.1 - loss)
        capitals.append(capital)
    assert paired.evidence_within(losses, 0.1) == pytest.approx(log(sum(capitals) / len(capitals)), abs=1e-12)
    mirrored = [-x for x in losses]
    assert paired.evidence_outside(losses, 0.1) == pytest.approx(paired.evidence_within(mirrored, -0.1), abs=1e-12)


@pytest.mark.parametrize("mean", [TOLERANCE, 0.08])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_looking_after_every_document_does_not_make_errors_more_frequent(mean: float, noise: float) -> None:
    rng = np.random.default_rng(1)
    alpha, wrong, repeats, n = 0.1, 0, 400, 400
    stakes = paired.SHARES / (1 - TOLERANCE)
    for _ in range(repeats):
        logs = np.log(1 + stakes[:, None] * (TOLERANCE - draw(rng, mean, n, noise)[None, :])).cumsum(1)
        capital = np.logaddexp.reduce(logs, axis=0) - log(len(stakes))
        wrong += bool((capital >= -log(alpha)).any())
    assert wrong <= alpha * repeats + 3 * (alpha * (1 - alpha) * repeats) ** 0.5


def test_a_search_over_many_bad_settings_rarely_recommends_one() -> None:
    rng = np.random.default_rng(2)
    truth = [[TOLERANCE + 0.005] * 4] * 5
    recommended = sum(search(rng, truth, 800, confidence=0.9)[0].best is not None for _ in range(100))
    assert recommended <= 10 + 3 * 3


def test_smallest_budget_that_is_good_enough_is_found() -> None:
    rng = np.random.default_rng(3)
    truth = [[0.8], [0.4], [0.15], [0.0], [0.0], [0.0]]
    found = [search(rng, truth)[0].best for _ in range(30)]
    assert all(best is not None for best in found)
    budgets = [best.candidate[0] for best in found]
    assert min(budgets) == 3 and budgets.count(3) >= 27


def test_best_variant_of_a_budget_survives_the_halving() -> None:
    rng = np.random.default_rng(4)
    truth = [[0.5, 0.3, 0.0, 0.4, 0.6, 0.3]]
    found = [search(rng, truth)[0].best for _ in range(20)]
    assert [best.candidate for best in found] == [(0, 2)] * 20


def test_none_within_tolerance_is_shown_with_few_documents() -> None:
    answer, asked = search(np.random.default_rng(5), [[0.9], [0.6], [0.5]])
    assert answer.best is None
    assert {v.decision for v in answer.verdicts} == {paired.OUTSIDE}
    assert max(asked) <= 64


def test_too_few_documents_prove_nothing_even_without_a_difference() -> None:
    answer, _ = search(np.random.default_rng(6), [[0.0]], documents=40, noise=0.0)
    assert answer.best is None and answer.verdicts[0].decision == paired.UNDECIDED
    assert answer.verdicts[0].mean_loss == 0 and answer.verdicts[0].at_most > TOLERANCE


def test_fewest_documents_is_near_the_binomial_limit() -> None:
    """With losses of 0 or 1, n documents without a loss exclude a mean of t only if (1 - t)^n <= alpha."""
    for tolerance, alpha in ((0.05, 0.05), (0.02, 0.05 / 24), (0.2, 0.01)):
        limit = ceil(log(alpha) / log(1 - tolerance))
        n = paired.fewest_documents(tolerance, alpha)
        assert limit <= n <= 1.6 * limit
        assert paired.evidence_within(np.zeros(n), tolerance) >= -log(alpha)


def test_upper_bound_covers_the_truth() -> None:
    rng = np.random.default_rng(7)
    missed = sum(paired.upper_bound(draw(rng, 0.1, 150, 0.1), 0.1) < 0.1 for _ in range(200))
    assert missed <= 20 + 3 * 4.3


def test_looks_double_and_end_with_all_documents() -> None:
    assert paired.looks(32, 200) == [32, 64, 128, 200]
    assert paired.looks(32, 20) == [20]

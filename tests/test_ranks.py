"""Ranks of explainers and the agreement of metrics, against hand-worked cases and Demšar's table."""

import numpy as np

from xaibatch.results import ranks

DEMSAR_Q = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
"""Demšar 2006, table 5(a): Nemenyi's q at 5% for 2 to 10 explainers."""


def test_friedman_and_ranks_by_hand():
    # ten patients who all order the three explainers alike: mean ranks 1, 2, 3, statistic 20, p = e**-10
    values = np.tile([[3.0, 2.0, 1.0]], (10, 1)) + np.arange(10)[:, None]
    ranking = ranks.rank(values, np.arange(10), 1, metric="m", explainers=["a", "b", "c"], seed=0)
    assert ranking.mean_ranks == (1.0, 2.0, 3.0)
    np.testing.assert_allclose(ranking.friedman_p, np.exp(-10), rtol=1e-9)
    assert (ranking.ranks, ranking.rank_low, ranking.rank_high) == ((1, 2, 3),) * 3
    assert ranking.probability_best == (1, 0, 0)
    downwards = ranks.rank(values, np.arange(10), -1, metric="m", explainers=["a", "b", "c"], seed=0)
    assert downwards.mean_ranks == (3.0, 2.0, 1.0)


def test_ranks_of_equal_explainers_are_uncertain():
    values = np.random.default_rng(0).normal(size=(50, 4))
    ranking = ranks.rank(values, np.arange(50), 1, metric="m", explainers="abcd", seed=0)
    assert max(ranking.rank_high) - min(ranking.rank_low) == 3
    assert max(ranking.mean_ranks) - min(ranking.mean_ranks) < ranking.critical_difference


def test_critical_difference_against_demsar_s_table():
    for k, q in zip(range(2, 11), DEMSAR_Q, strict=True):
        np.testing.assert_allclose(ranks.critical_difference(k, 100) / np.sqrt(k * (k + 1) / 600), q, atol=1.1e-3)


def test_an_explainer_without_scores_is_left_out_and_images_are_shared_by_the_others():
    values = np.random.default_rng(0).normal(size=(40, 3))
    values[:, 1] = np.nan
    values[:5, 2] = np.nan
    ranking = ranks.rank(values, np.arange(40), 1, metric="m", explainers="abc", seed=0)
    assert (ranking.explainers, ranking.num_images) == (("a", "c"), 35)


def test_metrics_that_disagree_are_said_to():
    # orders abcd, abcd and dcba: rank sums 6, 7, 8, 9 around 7.5, so S = 5 and W = 12 * 5 / (9 * 60) = 1/9
    orders = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [4, 3, 2, 1]])
    np.testing.assert_allclose(ranks.kendall_w(orders), 1 / 9, rtol=1e-12)
    base = np.tile([[4.0, 3.0, 2.0, 1.0]], (20, 1)) + np.arange(20)[:, None]
    rankings = [
        ranks.rank(v, np.arange(20), 1, metric=str(i), explainers="abcd", seed=0)
        for i, v in enumerate([base, base, -base])
    ]
    found = ranks.agreement(rankings)
    np.testing.assert_allclose(found.kendall_w, 1 / 9, rtol=1e-12)
    assert found.tau_MM.tolist() == [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]
    assert ranks.agreement(rankings[:1]) is None

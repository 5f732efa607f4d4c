"""Intervals of means: against hand-worked cases, SciPy and statsmodels, slow rewrites, and simulation with known
truth."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from xaibatch.results.statistics import (
    MIN_CLUSTERS,
    bounded_interval,
    cluster_sums,
    mean_intervals,
    resampling_weights,
    summarise,
    wilson,
)
from xaibatch.results.statistics_paired import compare

NUM_SIMULATIONS = 3000


def coverage(values_IK, truth, clusters_I=None, bounds=None, hits=None):
    """Share of the columns whose interval holds the truth, among those that have one, and the methods."""
    clusters_I = np.arange(len(values_IK)) if clusters_I is None else clusters_I
    columns = values_IK.shape[1]
    _, _, low, high, methods, _ = mean_intervals(
        values_IK,
        clusters_I,
        seed=0,
        bounds_K=None if bounds is None else [bounds] * columns,
        hits_K=None if hits is None else [hits] * columns,
    )
    held = (np.array(low) <= truth) & (truth <= np.array(high))
    made = np.array([method is not None for method in methods])
    return held[made].mean() if made.any() else np.nan, Counter(methods)


def test_sums_by_patient_by_hand():
    # patients 1, 0, 1, 2; the second column lacks the image of patient 2
    values = np.array([[1.0, 1.0], [2.0, 5.0], [3.0, np.nan], [4.0, np.nan]])
    counts, sums = cluster_sums(values, np.array([1, 0, 1, 2]))
    assert counts.tolist() == [[1, 1], [2, 1], [1, 0]]
    assert sums.tolist() == [[2, 5], [4, 1], [4, 0]]


def test_studentised_interval_equals_a_slow_rewrite_with_the_same_resamples():
    draws = np.random.default_rng(2)
    clusters = draws.integers(0, 14, 40)
    values = draws.lognormal(0, 0.8, size=40)
    means, errors, low, high, methods, num_clusters = mean_intervals(
        values[:, None], clusters, seed=5, num_resamples=500
    )
    patients = [values[clusters == c] for c in np.unique(clusters)]
    num = len(patients)

    def mean_and_error(groups):
        everything = np.concatenate(groups)
        mean = everything.mean()
        squares = sum(((g - mean).sum()) ** 2 for g in groups)
        return mean, np.sqrt(num / (num - 1) * squares) / len(everything)

    mean, error = mean_and_error(patients)
    t = []
    for weights in resampling_weights(num, 500, 5):
        groups = [patients[c] for c in range(num) for _ in range(int(weights[c]))]
        resampled_mean, resampled_error = mean_and_error(groups)
        t.append((resampled_mean - mean) / resampled_error)
    low_t, high_t = np.quantile(t, [0.025, 0.975], method="inverted_cdf")
    student = stats.t.ppf(0.975, num - 1)
    assert (methods[0], num_clusters[0]) == ("studentised", num)
    np.testing.assert_allclose([means[0], errors[0]], [mean, error], rtol=1e-12)
    expected = [mean - max(high_t, student) * error, mean + max(-low_t, student) * error]
    np.testing.assert_allclose([low[0], high[0]], expected, rtol=1e-9)
    assert high_t < student < -low_t  # one end from each, so that both are tested


DISTRIBUTIONS = {
    "normal": (lambda r, s: r.standard_normal(s), 0.0),
    "exponential": (lambda r, s: r.standard_exponential(s), 1.0),
    "lognormal, skewness 1.75": (lambda r, s: r.lognormal(0, 0.5, s), np.exp(0.125)),
    "lognormal, skewness 3.7": (lambda r, s: r.lognormal(0, 0.8, s), np.exp(0.32)),
    "lognormal, skewness 6.2": (lambda r, s: r.lognormal(0, 1, s), np.exp(0.5)),
    "beta(5,1), near its upper bound": (lambda r, s: r.beta(5, 1, s), 5 / 6),
    "gamma(1/2), skewness 2.8": (lambda r, s: r.gamma(0.5, 1, s), 0.5),
    "Student's t(5), heavy on both sides": (lambda r, s: r.standard_t(5, s), 0.0),
}


@pytest.mark.parametrize("num_images", [30, 100])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_intervals_cover_93_to_97_percent(name, num_images):
    draw, truth = DISTRIBUTIONS[name]
    covered, methods = coverage(draw(np.random.default_rng(num_images), (num_images, NUM_SIMULATIONS)), truth)
    assert 0.93 <= covered <= 0.97
    assert set(methods) == {"studentised"}


def test_coverage_of_a_very_heavy_tail_at_ten_patients_falls_short_by_the_stated_amount():
    # lognormal(0, 1), skewness 6.2; Student's t alone covers 84% there
    values = np.random.default_rng(4).lognormal(0, 1, (10, NUM_SIMULATIONS))
    assert 0.90 <= coverage(values, np.exp(0.5))[0] <= 0.93


@pytest.mark.parametrize("share", [0.9, 0.97])
@pytest.mark.parametrize("num_images", [10, 30, 100])
def test_scores_mostly_at_their_limit_are_never_given_too_short_an_interval(share, num_images):
    # 1 with probability `share`, else anything between 0.8 and 1: 97% of 30 such images are all equal in 40% of samples
    draws = np.random.default_rng(num_images)
    size = (num_images, 500)
    values = np.where(draws.random(size) < share, 1.0, draws.uniform(0.8, 1, size))
    truth = share + (1 - share) * 0.9
    covered, methods = coverage(values, truth, bounds=(0.0, 1.0), hits=False)
    assert covered >= 0.95
    assert set(methods) <= {"bounded", "studentised"}
    without_limits, methods = coverage(values, truth, hits=False)
    assert methods[None] > 0  # no interval rather than a wrong one
    assert not without_limits < 0.95


def test_equal_scores_get_the_exact_binomial_limit_of_their_range_or_no_interval():
    for number in (10, 30, 300):
        low, high = bounded_interval(np.full(number, 0.25), np.ones(number), (-1.0, 1.0), 0.025, seed=0)
        unseen = 1 - 0.025 ** (1 / number)  # Clopper and Pearson 1934: none of `number`
        np.testing.assert_allclose(
            [low, high], [0.25 - unseen * 1.25, 0.25 + unseen * 0.75], atol=0.01 * unseen + 0.004
        )
    column = np.full((30, 1), 0.25)
    assert summarise(column, np.arange(30), seed=0, bounds_K=[(-1.0, np.inf)])[0].interval is None
    assert summarise(column, np.arange(30), seed=0)[0].alike


def test_a_bounded_interval_equals_a_slow_rewrite_over_patients():
    draws = np.random.default_rng(0)
    own = np.where(np.arange(25) < 3, [*draws.random(3), *[0] * 22], 1.0)
    sizes = np.full(25, 2.0)
    weights = draws.dirichlet(np.ones(26), 40_000)
    expected = [np.quantile(weights @ [*own, limit], q) for limit, q in ((0.0, 0.025), (1.0, 0.975))]
    found = bounded_interval(own, sizes, (0.0, 1.0), 0.025, seed=0)
    np.testing.assert_allclose(found, expected, atol=0.004)  # Monte Carlo error of the ends: 0.001


@pytest.mark.parametrize("num_images", [30, 100])
def test_intervals_of_hits_cover(num_images):
    # Wilson's coverage of one share jumps by some percent from share to share; over shares it is 95%
    draws = np.random.default_rng(num_images)
    shares = draws.uniform(0.5, 0.95, NUM_SIMULATIONS)
    covered, methods = coverage((draws.random((num_images, NUM_SIMULATIONS)) < shares).astype(float), shares)
    assert 0.93 <= covered <= 0.97
    assert set(methods) == {"wilson"}


@pytest.mark.parametrize("kind", ["normal", "exponential", "lognormal", "hits"])
def test_intervals_cover_when_patients_have_several_images_and_images_alone_would_not(kind):
    draws = np.random.default_rng(2)
    clusters = np.repeat(np.arange(30), draws.integers(1, 8, 30))
    own, shared = draws.standard_normal((len(clusters), NUM_SIMULATIONS)), draws.standard_normal((30, NUM_SIMULATIONS))
    values, truth = shared[clusters] + 0.5 * own, 0.0
    if kind == "exponential":
        values, truth = draws.standard_exponential((30, NUM_SIMULATIONS))[clusters] + 0.5 * own, 1.0
    if kind == "lognormal":
        values = draws.lognormal(0, 0.5, (30, NUM_SIMULATIONS))[clusters] * np.exp(0.3 * own - 0.045)
        truth = np.exp(0.125)
    if kind == "hits":
        values, truth = (values < 0.9).astype(float), stats.norm.cdf(0.9 / np.hypot(1, 0.5))
    assert 0.93 <= coverage(values, truth, clusters)[0] <= 0.97
    assert coverage(values, truth)[0] < 0.80


def test_many_patients_use_the_expansion_which_is_where_the_bootstrap_tends():
    values = np.random.default_rng(1).exponential(size=(2400, 1))
    _, errors, low, high, methods, _ = mean_intervals(values, np.arange(2400), seed=0)
    fewer = mean_intervals(values[:2000], np.arange(2000), seed=0, num_resamples=8000)
    assert (methods, fewer[4]) == (["edgeworth"], ["studentised"])
    student = stats.t.ppf(0.975, 1999)
    mean = values.mean()
    ends = (np.array([low[0], high[0]]) - mean) / errors[0]
    bootstrapped = (np.array([fewer[2][0], fewer[3][0]]) - values[:2000].mean()) / fewer[1][0]
    # Monte Carlo error of a 2.5% quantile of 8,000 draws: 0.03
    np.testing.assert_allclose(ends, bootstrapped, atol=0.07)
    np.testing.assert_allclose(ends[0], -student, atol=1e-3)
    assert ends.sum() > 0.025  # longer upwards: it allows for the skew


def test_rare_exceptions_among_very_many_patients_do_not_use_the_expansion():
    values = np.ones((2400, 2))
    values[:29, 0], values[:30, 1] = 0.5, 0.5
    assert mean_intervals(values, np.arange(2400), seed=0, hits_K=[False] * 2)[4] == [None, "edgeworth"]


def test_wilson_equals_statsmodels():
    for hits, number in [(0, 12), (27, 30), (30, 30), (55, 100)]:
        expected = proportion_confint(hits, number, method="wilson")
        np.testing.assert_allclose(wilson(hits / number, number, stats.norm.ppf(0.975)), expected, atol=1e-12)


def test_only_hits_and_misses_get_wilson_s_interval():
    ones = np.ones((30, 2))
    hits, share = summarise(ones, np.arange(30), seed=0, hits_K=[True, False], bounds_K=[(0.0, 1.0)] * 2)
    assert (hits.interval.method, share.interval.method) == ("wilson", "bounded")
    assert (hits.alike, share.alike) == (False, True)
    assert hits.interval.low < 0.9
    assert 0.87 < share.interval.low < 0.89
    assert share.interval.high == 1.0
    # a difference of hits may be 0 or 1 everywhere and still is none: one of thirty excludes nothing
    differences = np.zeros((30, 1))
    differences[3] = 1
    found = compare(differences, np.arange(30), [1], seed=0, bounds_K=[(0.0, 1.0)])[0]
    assert found.interval.low < 0 < found.interval.high
    unbounded = compare(differences, np.arange(30), [1], seed=0)[0]
    assert (unbounded.interval, unbounded.verdict, unbounded.alike) == (None, "undecided", True)


def test_no_interval_below_ten_patients():
    values = np.random.default_rng(0).normal(size=(40, 1))
    assert summarise(values[:9], np.arange(9), seed=0)[0].interval is None
    assert summarise(values[:10], np.arange(10), seed=0)[0].interval is not None
    nine_patients = np.arange(40) % 9
    assert summarise(values, nine_patients, seed=0)[0].interval is None
    assert MIN_CLUSTERS == 10


def test_missing_scores_are_counted_and_change_nothing_else():
    values = np.random.default_rng(0).normal(size=(50, 1))
    padded = np.concatenate([values, np.full((7, 1), np.nan)])
    whole, with_missing = (summarise(v, np.arange(len(v)), seed=0)[0] for v in (values, padded))
    assert (with_missing.num_scored, with_missing.num_not_scored) == (50, 7)
    assert with_missing.interval == whole.interval
    assert (with_missing.mean, with_missing.median, with_missing.sd) == (whole.mean, whole.median, whole.sd)


def test_nothing_scored_gives_no_number():
    summary = summarise(np.full((20, 1), np.nan), np.arange(20), seed=0)[0]
    assert np.isnan(summary.mean)
    assert np.isnan(summary.median)
    assert (summary.interval, summary.num_scored, summary.num_not_scored) == (None, 0, 20)


def test_intervals_do_not_depend_on_the_company_a_column_keeps_or_on_the_order_of_images():
    draws = np.random.default_rng(0)
    values, clusters = draws.exponential(size=(60, 3)), np.repeat(np.arange(20), 3)
    values[:9, 1] = np.nan
    together = summarise(values, clusters, seed=1)
    alone = tuple(summarise(values[:, [k]], clusters, seed=1)[0] for k in range(3))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose([b.interval.low, b.interval.high], [a.interval.low, a.interval.high], rtol=1e-9)
    order = draws.permutation(60)
    shuffled = summarise(values[order], clusters[order], seed=1)
    for a, b in zip(together, shuffled, strict=True):
        np.testing.assert_allclose([b.interval.low, b.interval.high], [a.interval.low, a.interval.high], rtol=1e-9)


def test_intervals_move_and_scale_with_the_scores():
    values = np.random.default_rng(0).exponential(size=(40, 1))
    plain = summarise(values, np.arange(40), seed=0)[0].interval
    moved = summarise(1000 + 3 * values, np.arange(40), seed=0)[0].interval
    np.testing.assert_allclose([moved.low, moved.high], [1000 + 3 * plain.low, 1000 + 3 * plain.high], rtol=1e-9)


def test_intervals_stay_inside_the_metric_s_bounds():
    values = np.random.default_rng(0).beta(0.5, 0.1, (12, 1))
    assert summarise(values, np.arange(12), seed=0)[0].interval.high > 1
    assert summarise(values, np.arange(12), seed=0, bounds_K=[(0.0, 1.0)])[0].interval.high == 1


@settings(max_examples=150, deadline=None)
@given(
    scores=st.lists(st.one_of(st.sampled_from([0.0, 0.1, 1.0, 2.5]), st.floats(-1e6, 1e6)), min_size=10, max_size=24),
    bounds=st.tuples(st.sampled_from([-np.inf, -1.0, 0.0]), st.sampled_from([0.5, 1.0, np.inf])),
    images_per_patient=st.sampled_from([1, 2]),
)
def test_an_interval_holds_its_mean_even_where_scores_lie_outside_the_declared_bounds(
    scores, bounds, images_per_patient
):
    values = np.repeat(scores, images_per_patient)[:, None]
    clusters = np.arange(len(values)) // images_per_patient
    found = summarise(values, clusters, seed=0, bounds_K=[bounds], num_resamples=200)[0]
    difference = compare(values, clusters, [1], seed=0, bounds_K=[bounds], num_resamples=200)[0]
    for mean, interval in ((found.mean, found.interval), (difference.mean_difference, difference.interval)):
        assert interval is None or interval.low <= mean <= interval.high

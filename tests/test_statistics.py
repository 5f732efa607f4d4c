"""Intervals, tests, ranks: against hand-worked cases, SciPy and statsmodels, slow rewrites, and simulation with
known truth."""

import gc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from xaibatch.results import ranks
from xaibatch.results.statistics import (
    MIN_CLUSTERS,
    bounded_interval,
    cluster_sums,
    mean_intervals,
    resampling_weights,
    summarise,
    wilson,
)
from xaibatch.results.statistics_paired import (
    compare,
    fewest_patients,
    holm,
    images_needed,
    is_out_of_reach,
    sign_flip_p_values,
)
from xaibatch.results.statistics_repeats import noise_share

NUM_SIMULATIONS = 3000
TOLERANCE = 3 * np.sqrt(0.05 * 0.95 / NUM_SIMULATIONS)
"""Three standard errors of a coverage of 95% seen in so many simulations: 0.012."""


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


# -- intervals of the mean


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


def test_equal_differences_settle_only_what_the_metric_s_range_cannot_overturn():
    # 0.02 better on all of 40 images; one unseen image in twelve, worse by the whole range, would turn that round
    small, large = np.full((40, 1), 0.02), np.full((40, 1), 0.5)
    assert compare(small, np.arange(40), [1], seed=0, bounds_K=[(0.0, 1.0)])[0].verdict == "undecided"
    assert compare(large, np.arange(40), [1], seed=0, bounds_K=[(0.0, 1.0)])[0].verdict == "better"


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


def test_differences_larger_than_the_declared_range_are_judged_by_what_was_seen():
    # a metric said to lie in [0, 1] whose scores differ by 25: at its range's edge the interval would be [-1, -20]
    values = np.random.default_rng(0).normal(-25, 3, (30, 1))
    found = compare(values, np.arange(30), [1], seed=0, bounds_K=[(0.0, 1.0)])[0]
    free = compare(values, np.arange(30), [1], seed=0)[0]
    assert (found.interval, found.verdict) == (free.interval, "worse")


# -- paired comparisons


def test_sign_flip_by_hand_and_against_scipy():
    # 10 differences of +1: only the two patterns of all equal signs reach the sum of 10, so p = 2 / 2**10
    assert sign_flip_p_values(np.ones((10, 1)), np.arange(10), seed=0)[0] == 2 / 1024
    values = np.random.default_rng(1).normal(0.5, 1, (12, 3))
    for column, p in zip(values.T, sign_flip_p_values(values, np.arange(12), seed=0), strict=True):
        exact = stats.permutation_test((column,), np.mean, permutation_type="samples", n_resamples=np.inf)
        np.testing.assert_allclose(p, exact.pvalue, rtol=1e-12)


def test_sampled_sign_flips_agree_with_all_of_them_ties_included():
    values = np.random.default_rng(2).integers(-1, 3, (16, 4)).astype(float)
    sampled = sign_flip_p_values(values, np.arange(16), seed=0)
    for column, p in zip(values.T, sampled, strict=True):
        exact = stats.permutation_test((column,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert abs(p - exact) < 4 * np.sqrt(exact * (1 - exact) / 9999) + 1e-4


def test_sign_flips_keep_a_patient_s_images_together():
    draws = np.random.default_rng(3)
    clusters = np.repeat(np.arange(12), 4)
    values = draws.normal(0.3, 1, 12)[clusters][:, None]
    per_patient = sign_flip_p_values(values[::4], np.arange(12), seed=0)
    np.testing.assert_allclose(sign_flip_p_values(values, clusters, seed=0), per_patient, rtol=1e-12)


def test_very_many_patients_use_the_normal_limit():
    values = np.random.default_rng(4).normal(0.05, 1, (2500, 1))
    p = sign_flip_p_values(values, np.arange(2500), seed=0)[0]
    np.testing.assert_allclose(p, stats.ttest_1samp(values[:, 0], 0).pvalue, rtol=0.1)


@pytest.mark.parametrize("num_images", [12, 40])
def test_no_difference_raises_false_alarms_at_the_stated_rate(num_images):
    values = np.random.default_rng(num_images).standard_normal((num_images, NUM_SIMULATIONS))
    rate = (sign_flip_p_values(values, np.arange(num_images), seed=0, alpha=1.0) <= 0.05).mean()
    assert abs(rate - 0.05) <= TOLERANCE


def test_explainers_alike_in_the_mean_only_raise_few_false_alarms():
    # exponential differences around zero: the permutation test alone raises 7.4% at 40 images, the interval tames it
    values = np.random.default_rng(0).standard_exponential((40, NUM_SIMULATIONS)) - 1
    alone = sign_flip_p_values(values, np.arange(40), seed=0, alpha=1.0) < 0.05
    found = mean_intervals(values, np.arange(40), seed=0)
    excluded = (np.array(found[2]) > 0) | (np.array(found[3]) < 0)
    assert 0.06 < alone.mean() < 0.1
    assert (alone & excluded).mean() <= 0.05 + TOLERANCE
    settled = alone & excluded
    chosen = [*range(6), *np.flatnonzero(settled)[:6]]
    verdicts = [compare(values[:, [k]], np.arange(40), [1], seed=0)[0].verdict for k in chosen]
    assert [v != "undecided" for v in verdicts] == settled[chosen].tolist()


def test_a_whole_family_without_a_difference_raises_an_alarm_in_at_most_five_percent(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # statsmodels collects garbage in every correction: 0.2 s each
    alarms = 0
    for run in range(400):
        draws = np.random.default_rng(run)
        scores = draws.normal(size=(12, 5)) + draws.normal(size=(12, 1))
        pairs = [(a, b) for a in range(5) for b in range(a)]
        differences = np.stack([scores[:, a] - scores[:, b] for a, b in pairs], 1)
        corrected = holm(sign_flip_p_values(differences, np.arange(12), seed=run))
        alarms += bool((corrected < 0.05).any())
    assert alarms / 400 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_holm_equals_statsmodels():
    p_values = np.random.default_rng(0).random(30) ** 4
    np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1], rtol=1e-12)


@pytest.mark.parametrize("effect", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("num_tests", [1, 20])
def test_images_needed_agree_with_the_t_test_s_power(effect, num_tests):
    expected = TTestPower().solve_power(effect, alpha=0.05 / num_tests, power=0.8)
    np.testing.assert_allclose(images_needed(effect, num_tests, 0.05, 0.8), expected, rtol=0.02)


def test_verdicts_follow_the_metric_s_own_direction():
    draws = np.random.default_rng(0)
    values = np.stack([draws.normal(1, 1, 60)] * 3 + [draws.normal(0, 1, 60)], 1)
    verdicts = [c.verdict for c in compare(values, np.arange(60), [1, -1, 0, 1], seed=0)]
    assert verdicts == ["better", "worse", "higher", "undecided"]
    assert [c.verdict for c in compare(-values, np.arange(60), [1, -1, 0, 1], seed=0)][:3] == [
        "worse",
        "better",
        "lower",
    ]


def test_a_comparison_by_hand():
    differences = np.array([1.0, 2.0, 3.0, -1.0, 0.0] * 4)[:, None]
    found = compare(differences, np.arange(20), [1], seed=0)[0]
    assert found.mean_difference == 1.0
    assert found.wins == 0.6 + 0.1  # three of five higher, one of five tied
    np.testing.assert_allclose(found.effect_size, 1.0 / np.std(differences, ddof=1))
    assert (found.num_images, found.num_tests, found.more_images) == (20, 1, None)


def test_the_promised_number_of_images_settles_an_undecided_difference_in_about_eighty_percent():
    # a true difference of 0.3 standard deviations, seen exactly as such in the first sample
    draws = np.random.default_rng(1)
    first = draws.normal(size=40)
    first = 0.3 + (first - first.mean()) / first.std(ddof=1)
    found = compare(first[:, None], np.arange(40), [1], seed=0)[0]
    assert found.verdict == "undecided"
    again = draws.normal(0.3, 1, (40 + found.more_images, 1000))
    settled = (sign_flip_p_values(again, np.arange(len(again)), seed=0, alpha=1.0) < 0.05).mean()
    assert 0.76 <= settled <= 0.85


@pytest.mark.parametrize(("num_patients", "num_tests"), [(10, 45), (11, 90), (13, 300), (14, 1000)])
@pytest.mark.parametrize("images_per_patient", [1, 3])
def test_a_family_too_large_for_its_patients_gets_no_verdict_and_says_how_many_patients_would_do(
    num_patients, num_tests, images_per_patient
):
    # all differences large and of one sign: p = 2 / 2**C, the smallest there is
    def judged(num):
        clusters = np.repeat(np.arange(num), images_per_patient)
        values = np.random.default_rng(0).normal(5, 0.3, (len(clusters), num_tests))
        return compare(values, clusters, [1] * num_tests, seed=0, num_resamples=200)

    needed = fewest_patients(num_tests)
    assert num_tests * 2 / 2**needed < 0.05 <= num_tests * 2 / 2 ** (needed - 1)
    found = judged(num_patients)
    assert is_out_of_reach(found)
    assert {c.verdict for c in found} == {"undecided"}
    assert {c.more_images for c in found} == {(needed - num_patients) * images_per_patient}
    assert {c.verdict for c in judged(needed - 1)} == {"undecided"}
    if 2**needed <= 9999:  # beyond, patterns are drawn, and one more hit than expected is too many
        assert {c.verdict for c in judged(needed)} == {"better"}
        assert not is_out_of_reach(judged(needed))


def test_drawn_sign_patterns_give_no_smaller_p_value_than_all_of_them():
    values = np.ones((14, 40))
    values[0, ::2] = 0  # one patient less
    smallest = sign_flip_p_values(values, np.arange(14), seed=0)
    assert smallest[::2].min() >= 2 / 2**13
    assert smallest[1::2].min() >= 2 / 2**14


def test_too_few_patients_give_no_p_value_and_do_not_count_in_the_family():
    values = np.random.default_rng(0).normal(1, 1, (30, 2))
    values[9:, 1] = np.nan
    large, small = compare(values, np.arange(30), [1, 1], seed=0)
    assert (small.verdict, small.p_value, small.p_holm, small.interval) == ("too few", None, None, None)
    assert large.num_tests == 1


# -- ranks

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


# -- repeats


def test_noise_share_by_hand():
    # three images, two draws each: within squares (0.5 + 0.5 + 2) / 3 = 1; means 0.5, 4.5, 8 around 13/3, so between is
    # 2 * (14.6944 + 0.0278 + 13.4444) / 2 = 28.1667; variance of images (28.1667 - 1) / 2 = 13.5833; share 1 / 14.5833
    values = np.array([[0.0, 1.0], [4.0, 5.0], [7.0, 9.0]])
    found = noise_share(values, np.arange(3), seed=0)
    np.testing.assert_allclose(found.share, 1 / (1 + (28 + 1 / 6 - 1) / 2), rtol=1e-12)
    assert (found.low, found.high) == (None, None)  # three images are too few for an interval


def test_noise_share_agrees_with_the_f_statistic():
    draws = np.random.default_rng(0)
    values = draws.normal(size=(30, 1)) + 0.7 * draws.normal(size=(30, 4))
    f = stats.f_oneway(*values).statistic
    found = noise_share(values, np.arange(30), seed=0)
    np.testing.assert_allclose(found.share, 1 / (1 + (f - 1) / 4), rtol=1e-12)
    np.testing.assert_allclose(found.share_of_mean, 1 / f, rtol=1e-12)


def test_noise_share_of_known_variances_and_of_none():
    draws = np.random.default_rng(1)
    values = draws.normal(size=(800, 1)) + 0.5 * draws.normal(size=(800, 3))
    values[::7, 2] = np.nan
    found = noise_share(values, np.arange(800), seed=0)
    assert found.low < 0.2 < found.high  # 0.25 / 1.25
    assert found.high - found.low < 0.06
    assert noise_share(np.repeat(draws.normal(size=(30, 1)), 3, 1), np.arange(30), seed=0).share == 0
    assert noise_share(draws.normal(size=(30, 1)), np.arange(30), seed=0) is None

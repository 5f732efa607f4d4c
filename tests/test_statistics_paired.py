"""Paired comparisons: p-values, verdicts and what would settle them, against hand-worked cases, SciPy and statsmodels,
and simulation with known truth."""

import gc

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from xaibatch.results.statistics import mean_intervals
from xaibatch.results.statistics_paired import (
    compare,
    fewest_patients,
    holm,
    images_needed,
    is_out_of_reach,
    sign_flip_p_values,
)

NUM_SIMULATIONS = 3000
TOLERANCE = 3 * np.sqrt(0.05 * 0.95 / NUM_SIMULATIONS)
"""Three standard errors of a rate of 5% seen in so many simulations: 0.012."""


def test_equal_differences_settle_only_what_the_metric_s_range_cannot_overturn():
    # 0.02 better on all of 40 images; one unseen image in twelve, worse by the whole range, would turn that round
    small, large = np.full((40, 1), 0.02), np.full((40, 1), 0.5)
    assert compare(small, np.arange(40), [1], seed=0, bounds_K=[(0.0, 1.0)])[0].verdict == "undecided"
    assert compare(large, np.arange(40), [1], seed=0, bounds_K=[(0.0, 1.0)])[0].verdict == "better"


def test_differences_larger_than_the_declared_range_are_judged_by_what_was_seen():
    # a metric said to lie in [0, 1] whose scores differ by 25: at its range's edge the interval would be [-1, -20]
    values = np.random.default_rng(0).normal(-25, 3, (30, 1))
    found = compare(values, np.arange(30), [1], seed=0, bounds_K=[(0.0, 1.0)])[0]
    free = compare(values, np.arange(30), [1], seed=0)[0]
    assert (found.interval, found.verdict) == (free.interval, "worse")


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

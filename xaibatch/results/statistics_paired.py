"""Paired differences of scores in, verdicts out: which is better, by how much, and what would settle the undecided.

Every comparison is within images: the difference of the two scores of the same image. The p-value is that of a
sign-flip permutation test over patients. It was preferred to Wilcoxon's signed ranks because it tests the quantity
that the table shows (the mean, not the pseudo-median), keeps a patient's images together, and needs no rule for
ties, which discrete scores are full of. Because the sum of squares is the same under every flip, the test on the sum
is also the test on Student's t, and so stays valid for large numbers where the differences are skewed (Janssen 1997,
Statistics & Probability Letters 36).

Shape letters: I images, K comparisons, C patients, B sign patterns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import norm

from xaibatch.results.statistics import MIN_CLUSTERS, NUM_RESAMPLES, Interval, cluster_sums, mean_intervals
from xaibatch.seeding import keyed_generator

NUM_SIGN_PATTERNS: Final = 9999
MAX_PERMUTED_CLUSTERS: Final = 2000
"""With more patients the permutation distribution is its normal limit."""

ALPHA: Final = 0.05
POWER: Final = 0.8

Verdict = Literal["better", "worse", "higher", "lower", "undecided", "too few", "dependent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One paired difference (first minus second).

    effect_size:  mean difference over the standard deviation of the differences (Cohen's d_z).
    wins:         share of images on which the first is the better one (higher, where a metric has no direction),
                  ties half. Like `effect_size` and `detectable` NaN where images are not independent.
    p_value:      two-sided; None for too few patients. `p_holm`: after Holm's correction over `num_tests` tests.
    verdict:      in the metric's own direction, of the first explainer; `higher`/`lower` where neither is better;
                  `dependent` where nothing was tested, as a metric compares images with each other.
    more_images:  how many more images (of as many per patient) would settle an undecided comparison with 80%
                  probability at the corrected level, if the difference is as observed, and at least as many as the
                  test needs to reach that level at all (`fewest_patients`); None where it is settled or no difference
                  was seen.
    interval:     None for too few patients or dependent images, and where nearly all differences are equal under a
                  metric without limits.
    detectable:   the smallest difference that this number of images would have found with 80% probability.
    """

    mean_difference: float
    interval: Interval | None
    effect_size: float
    wins: float
    p_value: float | None
    p_holm: float | None
    verdict: Verdict
    more_images: int | None
    detectable: float
    num_images: int
    num_clusters: int
    num_tests: int

    @property
    def alike(self) -> bool:
        """Nearly all differences are equal: the interval rests on the metric's range, or there is none."""
        if self.interval is None:
            return self.verdict != "dependent" and self.num_clusters >= MIN_CLUSTERS
        return self.interval.method == "bounded"


def compare(
    differences_IK: NDArray[np.float64],
    clusters_I: NDArray[np.int64],
    signs_K: Sequence[int],
    *,
    seed: int,
    bounds_K: Sequence[tuple[float, float]] | None = None,
    dependent_K: Sequence[bool] | None = None,
    alpha: float = ALPHA,
    power: float = POWER,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[Comparison, ...]:
    """Judge each column of paired differences (NaN where one of the two is not scored); all columns are one family
    for Holm.

    signs_K: +1 where higher is better, -1 where lower is, 0 where neither. bounds_K: the range of the metric's scores
    (None: without limits); a difference lies within plus and minus its width. dependent_K: comparisons whose images are
    not independent (None: no comparison's): they are not tested and do not count in the family.
    """
    means, errors, lows, highs, methods, num_clusters = mean_intervals(
        differences_IK,
        clusters_I,
        seed=seed,
        bounds_K=[(low - high, high - low) for low, high in bounds_K] if bounds_K else None,
        hits_K=[False] * differences_IK.shape[1],
        dependent_K=dependent_K,
        confidence=1 - alpha,
        num_resamples=num_resamples,
    )
    dependent = np.array(dependent_K or [False] * len(means), bool)
    testable = (num_clusters >= MIN_CLUSTERS) & ~dependent
    p_values = np.full(len(means), np.nan)
    num_tests = int(testable.sum())
    if num_tests:
        p_values[testable] = sign_flip_p_values(differences_IK[:, testable], clusters_I, seed=seed, alpha=alpha)
    corrected = holm(p_values)
    comparisons = []
    for k, sign in enumerate(signs_K):
        column = differences_IK[np.isfinite(differences_IK[:, k]), k]
        method = methods[k]
        interval = Interval(low=lows[k], high=highs[k], method=method) if method else None
        untested: Verdict = "dependent" if dependent[k] else "too few"
        verdict = _verdict(float(means[k]), interval, float(corrected[k]), sign, alpha) if testable[k] else untested
        comparisons.append(
            Comparison(
                mean_difference=float(means[k]),
                interval=interval,
                effect_size=np.nan if dependent[k] else _effect_size(column),
                wins=np.nan if dependent[k] else _wins(column, sign),
                p_value=float(p_values[k]) if testable[k] else None,
                p_holm=float(corrected[k]) if testable[k] else None,
                verdict=verdict,
                more_images=_more_images(
                    float(means[k]), float(errors[k]), column.size, int(num_clusters[k]), num_tests, alpha, power
                )
                if verdict == "undecided"
                else None,
                detectable=_detectable(float(errors[k]), num_tests, alpha, power),
                num_images=int(column.size),
                num_clusters=int(num_clusters[k]),
                num_tests=num_tests,
            )
        )
    return tuple(comparisons)


def sign_flip_p_values(
    differences_IK: NDArray[np.float64], clusters_I: NDArray[np.int64], *, seed: int, alpha: float = ALPHA
) -> NDArray[np.float64]:
    """Two-sided p-values (K,) of the hypothesis that each column's differences are symmetric about zero, patients
    exchangeable.

    Exact (all 2^C patterns) where these are at most NUM_SIGN_PATTERNS; else that many random patterns, or as many
    more as a Holm correction over K columns needs to reach `alpha`, with the observed pattern counted in (Phipson &
    Smyth 2010), so that no p-value is zero or below the smallest of all patterns, 2 / 2^C; else, above
    MAX_PERMUTED_CLUSTERS patients, the normal limit.
    """
    sums_CK = cluster_sums(differences_IK, clusters_I)[1]
    num = len(sums_CK)
    observed_K = np.abs(sums_CK.sum(0))
    slack_K = 1e-9 * np.abs(sums_CK).sum(0)
    if num > MAX_PERMUTED_CLUSTERS:
        spread_K = np.sqrt((sums_CK**2).sum(0))
        z_K = np.divide(observed_K, spread_K, out=np.zeros_like(spread_K), where=spread_K > 0)
        limit: NDArray[np.float64] = 2 * norm.sf(z_K)
        return limit
    if 2**num <= NUM_SIGN_PATTERNS:
        patterns_BC = 1.0 - 2.0 * ((np.arange(2**num)[:, None] >> np.arange(num)) & 1)
        exact: NDArray[np.float64] = (np.abs(patterns_BC @ sums_CK) >= observed_K - slack_K).mean(0)
        return exact
    num_patterns = max(NUM_SIGN_PATTERNS, int(np.ceil(2 * differences_IK.shape[1] / alpha)) - 1)
    generator = keyed_generator(seed, "", "sign_flip", 0, num)
    at_least_K = np.ones(sums_CK.shape[1])
    for start in range(0, num_patterns, 1000):
        size = (min(1000, num_patterns - start), num)
        flips_BC = 1.0 - 2.0 * generator.integers(0, 2, size=size, dtype=np.int8)
        at_least_K += (np.abs(flips_BC @ sums_CK) >= observed_K - slack_K).sum(0)
    smallest_K = np.exp2(1.0 - (sums_CK != 0).sum(0))  # the observed pattern and its mirror image
    return np.maximum(at_least_K / (num_patterns + 1), np.minimum(smallest_K, 1.0))


def fewest_patients(num_tests: int, alpha: float = ALPHA) -> int:
    """Patients from which on a difference can be found at all: the smallest p-value of sign flips, 2 / 2^C where every
    patient's difference has the same sign, is then below alpha / num_tests (Bonferroni; for the smallest p-value of a
    family Holm asks the same).

    >>> fewest_patients(1), fewest_patients(12), fewest_patients(13)  # 2 / 2**9 * 13 = 0.051
    (6, 9, 10)
    """
    num = 1
    while num_tests * 2.0 ** (1 - num) >= alpha:
        num += 1
    return num


def is_out_of_reach(family: Iterable[Comparison], alpha: float = ALPHA) -> bool:
    """Whether comparisons of one family are so many for their patients that none can get a verdict, however large its
    difference: the smallest possible p-value fails Holm's first step, and with it all others fail."""
    tested = [c for c in family if c.p_value is not None]
    return bool(tested) and max(c.num_clusters for c in tested) < fewest_patients(tested[0].num_tests, alpha)


def holm(p_values_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's step-down correction over the entries that are not NaN.

    >>> import numpy as np
    >>> holm(np.array([0.01, np.nan, 0.04, 0.03])).round(3).tolist()
    [0.03, nan, 0.06, 0.06]
    """
    from statsmodels.stats.multitest import multipletests  # slow to import

    corrected = np.full(len(p_values_K), np.nan)
    tested = np.isfinite(p_values_K)
    if tested.any():
        corrected[tested] = multipletests(p_values_K[tested], method="holm")[1]
    return corrected


def images_needed(effect: float, num_tests: int, alpha: float, power: float) -> float:
    """Independent differences needed to find a standardised mean difference with a two-sided t-test at level alpha /
    num_tests (Bonferroni, of which Holm needs at most as many): the normal formula with Guenther's correction z²/2
    (1981).

    >>> round(images_needed(0.5, 1, 0.05, 0.8))  # Cohen's table: 34 pairs
    33
    """
    from statsmodels.stats.power import normal_sample_size_one_tail  # slow to import

    level = alpha / (2 * num_tests)
    z = float(ndtri(1 - level))
    return float(normal_sample_size_one_tail(effect, power, level)) + z * z / 2


def _verdict(mean: float, interval: Interval | None, p_holm: float, sign: int, alpha: float) -> Verdict:
    """Decided where both the corrected p-value and the interval say so: the first is exact for explainers that are
    exchangeable, the second allows for skewed differences of explainers that are alike in the mean only. Differences
    that are nearly all equal, and not zero, so need an interval from the metric's range that excludes zero: sign flips
    know nothing of a rare large difference to the other side."""
    if p_holm >= alpha or interval is None or interval.low <= 0 <= interval.high:
        return "undecided"
    if sign == 0:
        return "higher" if mean > 0 else "lower"
    return "better" if mean * sign > 0 else "worse"


def _effect_size(column: NDArray[np.float64]) -> float:
    if column.size < 2:
        return np.nan
    spread = column.std(ddof=1)
    return (
        float(column.mean() / spread) if spread > 0 else float(np.sign(column.mean()) * np.inf) if column.any() else 0.0
    )


def _wins(column: NDArray[np.float64], sign: int) -> float:
    return float((column * (sign or 1) > 0).mean() + 0.5 * (column == 0).mean()) if column.size else np.nan


def _more_images(
    mean: float, error: float, num_images: int, num_clusters: int, num_tests: int, alpha: float, power: float
) -> int | None:
    """The design effect of several images per patient is already in the standard error."""
    if mean == 0 or not error > 0:
        return None
    effect = abs(mean) / (error * np.sqrt(num_images))
    for_power = images_needed(effect, num_tests, alpha, power) - num_images
    for_the_test = (fewest_patients(num_tests, alpha) - num_clusters) * num_images / num_clusters
    return max(1, int(np.ceil(max(for_power, for_the_test))))


def _detectable(error: float, num_tests: int, alpha: float, power: float) -> float:
    if not num_tests:
        return np.nan
    return float(error * (ndtri(1 - alpha / (2 * num_tests)) + ndtri(power)))

"""Scores with their patients in, means with honest 95% intervals out.

Images of one patient are alike, so patients are resampled, not images (cluster bootstrap; Davison & Hinkley 1997,
section 3.8). The mean over images is a ratio of patient sums. Each end of its interval is the farther one of two:
Student's t, which is too short on the long side of skewed scores, and the studentised bootstrap (Efron 1981; Hall
1988, "Theoretical comparison of bootstrap confidence intervals", Annals of Statistics 16), which is too short on the
other side, and at 30 images a little on both. Simulated (tests/test_statistics.py), a 95% interval made so covers

- 93 to 97% from 30 patients on, for normal, exponential, gamma(1/2), beta(5, 1), lognormal scores up to scale 1
  (skewness 6), Student's t with 5 degrees of freedom, one image a patient or several;
- 93 to 97% at 10 to 29 patients too, but 91 to 93% of lognormal scores of scale 0.8 and more;
- more than 97%, so too long but not wrong, for scores in two heaps or mostly at their limit.

Where nearly all scores are equal, the sample does not show what its rare exceptions weigh, and no interval made from
it alone covers 95%. There the metric's range stands in (`bounded_interval`: 95% and more, often 99%), and a metric
without limits gets no interval. Not held, by this or any other interval: heavier tails, or exceptions that are rarer
than one image in a sample and far outside all others, under a metric without limits.

Shape letters: I images, K columns (one statistic each), C patients, B resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from xaibatch.seeding import keyed_generator

MIN_CLUSTERS: Final = 10
"""Below so many patients (or images of unknown patient) no interval and no p-value is given."""

NUM_RESAMPLES: Final = 2000
MAX_BOOTSTRAP_CLUSTERS: Final = 2000
"""With more patients the studentised quantiles come from their Edgeworth expansion: the bootstrap would only redraw
it."""

MIN_APART: Final = 30
"""So many patients must differ from the most common score before the Edgeworth expansion describes their mean."""

NUM_BOUNDED_DRAWS: Final = 20_000
"""Random weightings behind a `bounded` interval."""

_COLUMNS_AT_ONCE: Final = 256
_FLAT: Final = 1e-6
"""A resample whose spread is below this share of the sample's has none: what is left is rounding."""

_SAME_DIGITS: Final = 9
"""Scores that agree in so many digits of the largest are equal."""

Method = Literal["studentised", "edgeworth", "wilson", "bounded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A confidence interval, in the unit of the score, and how it was made."""

    low: float
    high: float
    method: Method


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One column of scores. `mean`, `median` and `sd` are NaN where nothing is scored; `interval` is None below
    MIN_CLUSTERS patients, where nearly all scores of a metric without limits are equal, and where images are not
    `independent`. `standard_error` allows for patients with several images; NaN where images are not independent."""

    mean: float
    median: float
    sd: float
    standard_error: float
    interval: Interval | None
    num_scored: int
    num_not_scored: int
    num_clusters: int
    independent: bool = True
    """False for a metric that compares images with each other."""

    @property
    def alike(self) -> bool:
        """Nearly all scores are equal: the interval rests on the metric's range, or there is none."""
        if self.interval is None:
            return self.independent and self.num_clusters >= MIN_CLUSTERS
        return self.interval.method == "bounded"


def summarise(
    values_IK: NDArray[np.float64],
    clusters_I: NDArray[np.int64],
    *,
    seed: int,
    bounds_K: Sequence[tuple[float, float]] | None = None,
    hits_K: Sequence[bool] | None = None,
    dependent_K: Sequence[bool] | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[Summary, ...]:
    """Mean, median, spread and interval of each column; NaN entries are counted as not scored and left out.

    bounds_K, hits_K, dependent_K: see `mean_intervals`. The same seed and number of patients give the same resamples
    for every column, so that columns of one table are comparable.

    >>> import numpy as np
    >>> summarise(np.arange(40.0)[:, None], np.arange(40), seed=0)[0].mean
    19.5
    """
    means, errors, lows, highs, methods, num_clusters = mean_intervals(
        values_IK,
        clusters_I,
        seed=seed,
        bounds_K=bounds_K,
        hits_K=hits_K,
        dependent_K=dependent_K,
        confidence=confidence,
        num_resamples=num_resamples,
    )
    summaries = []
    for k in range(values_IK.shape[1]):
        scored = values_IK[np.isfinite(values_IK[:, k]), k]
        method = methods[k]
        interval = Interval(low=lows[k], high=highs[k], method=method) if method else None
        summaries.append(
            Summary(
                mean=float(means[k]),
                median=float(np.median(scored)) if scored.size else np.nan,
                sd=float(scored.std(ddof=1)) if scored.size > 1 else np.nan,
                standard_error=float(errors[k]),
                interval=interval,
                num_scored=int(scored.size),
                num_not_scored=int(values_IK.shape[0] - scored.size),
                num_clusters=int(num_clusters[k]),
                independent=not (dependent_K and dependent_K[k]),
            )
        )
    return tuple(summaries)


def mean_intervals(
    values_IK: NDArray[np.float64],
    clusters_I: NDArray[np.int64],
    *,
    seed: int,
    bounds_K: Sequence[tuple[float, float]] | None = None,
    hits_K: Sequence[bool] | None = None,
    dependent_K: Sequence[bool] | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[float], list[float], list[Method | None], NDArray[np.int64]]:
    """Return means, standard errors, lower and upper ends, method (None: no interval) and number of patients per
    column.

    bounds_K: the range of each column's scores (infinite where there is none), to which intervals are clipped; scores
    outside it widen it, so that an interval always holds its mean.
    Hits and misses (all 0 or 1; `hits_K` says of which columns that is the scale, None: of all) get the Wilson interval
    with the number of images deflated by the design effect, and Student's quantile where patients have several images.
    Other columns of nearly equal scores get their `bounded_interval`, or none where the range is infinite.
    dependent_K: columns whose scores depend on the company of other images (None: no column's). How much is unknown,
    and so is their standard error; they get no interval.
    """
    counts_CK, sums_CK = cluster_sums(values_IK, clusters_I)
    num_columns = values_IK.shape[1]
    means, errors = np.full(num_columns, np.nan), np.full(num_columns, np.nan)
    lows, highs = [np.nan] * num_columns, [np.nan] * num_columns
    methods: list[Method | None] = [None] * num_columns
    num_clusters = (counts_CK > 0).sum(0)
    tail = (1 - confidence) / 2
    for present_C, columns in _by_pattern(counts_CK > 0):
        num = int(present_C.sum())
        if num == 0:
            continue
        n_Ck, s_Ck = counts_CK[np.ix_(present_C, columns)], sums_CK[np.ix_(present_C, columns)]
        means[columns] = s_Ck.sum(0) / n_Ck.sum(0)
        residuals_Ck = s_Ck - means[columns] * n_Ck
        if num > 1:
            errors[columns] = _standard_errors(residuals_Ck, n_Ck)
        if num < MIN_CLUSTERS:
            continue
        low, high, how = _studentised_or_edgeworth(residuals_Ck, n_Ck, errors[columns], tail, seed, num_resamples)
        own_Ck = s_Ck / n_Ck
        for j, k in enumerate(columns):
            if dependent_K and dependent_K[k]:
                continue
            scored = values_IK[np.isfinite(values_IK[:, k]), k]
            least, most = bounds_K[k] if bounds_K else (-np.inf, np.inf)
            least, most = min(least, float(scored.min())), max(most, float(scored.max()))
            if (hits_K is None or hits_K[k]) and np.isin(scored, (0.0, 1.0)).all():
                z = float(ndtri(1 - tail) if num == scored.size else stdtrit(num - 1, 1 - tail))
                lows[k], highs[k] = wilson(float(means[k]), _effective_number(scored, float(errors[k]), num), z)
                methods[k] = "wilson"
            elif not np.isfinite(low[j] + high[j]) or nearly_equal(own_Ck[:, j], tail):
                if np.isfinite(least) and np.isfinite(most):
                    lows[k], highs[k] = bounded_interval(own_Ck[:, j], n_Ck[:, j], (least, most), tail, seed)
                    methods[k] = "bounded"
            else:
                lows[k], highs[k] = max(least, float(means[k] + low[j])), min(most, float(means[k] + high[j]))
                methods[k] = how[j]
            if methods[k]:  # where all scores are equal, the mean's rounding must not push it past an end
                lows[k], highs[k] = min(lows[k], float(means[k])), max(highs[k], float(means[k]))
    if dependent_K:
        errors[np.array(dependent_K, bool)] = np.nan
    return means, errors, lows, highs, methods, num_clusters


def cluster_sums(
    values_IK: NDArray[np.float64], clusters_I: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Number of scored images and sum of their scores per patient: two arrays (C,K), patients in order of their
    number."""
    order = np.argsort(clusters_I, kind="stable")
    starts = np.flatnonzero(np.diff(clusters_I[order], prepend=-1))
    scored_IK = np.isfinite(values_IK[order])
    counts_CK = np.add.reduceat(scored_IK.astype(np.float64), starts, axis=0)
    sums_CK = np.add.reduceat(np.where(scored_IK, values_IK[order], 0.0), starts, axis=0)
    return counts_CK, sums_CK


def wilson(share: float, number: float, z: float) -> tuple[float, float]:
    """Wilson's score interval for a share seen in `number` independent images (not necessarily whole); `z` is the
    upper tail's quantile, 1.96 for 95%.

    >>> low, high = wilson(0.9, 30, 1.959964)
    >>> round(low, 4), round(high, 4)
    (0.7438, 0.9654)
    """
    from statsmodels.stats.proportion import proportion_confint  # slow to import

    low, high = proportion_confint(share * number, number, alpha=2 * ndtr(-z), method="wilson")
    return float(max(0.0, low)), float(min(1.0, high))


def nearly_equal(own_C: NDArray[np.float64], tail: float) -> bool:
    """Whether so few patients differ from the most common value that more than a share `tail` of the resamples would
    miss them all: up to three patients in any number for the 2.5% of a 95% interval. Beyond MAX_BOOTSTRAP_CLUSTERS,
    where nothing is resampled, fewer than MIN_APART.

    >>> import numpy as np
    >>> [nearly_equal(np.r_[np.ones(30), np.zeros(rare)], 0.025) for rare in (0, 3, 4)]
    [True, True, False]
    """
    apart = len(own_C) - int(_is_common(own_C).sum())
    if len(own_C) > MAX_BOOTSTRAP_CLUSTERS:
        return apart < MIN_APART
    return bool((1 - apart / len(own_C)) ** len(own_C) > tail)


def bounded_interval(
    own_C: NDArray[np.float64], n_C: NDArray[np.float64], bounds: tuple[float, float], tail: float, seed: int
) -> tuple[float, float]:
    """Interval of a mean from the range of the scores alone: each end is that of a random weighting of the patients
    and of one unseen patient at the limit (Gaffke 2005; Learned-Miller & Thomas 2019, "A new confidence interval for
    the mean of a bounded random variable"), so it covers at least 95%, however rare what was not seen is.

    own_C: mean score of each patient; n_C: number of images of each. For equal scores of single images it is the
    exact binomial interval with every unseen image at the limit, of which the rule of three is the short form:

    >>> import numpy as np
    >>> low, high = bounded_interval(np.ones(30), np.ones(30), (0.0, 1.0), 0.025, seed=0)
    >>> round(low, 2), high  # 1 - 0.025 ** (1 / 30) = 0.116 might be 0
    (0.88, 1.0)

    Deviation: patients with several images count with their number, the unseen one with the mean number. All patients
    of the most common value share one gamma variable of their sizes' mean and variance (exact for equal sizes).
    """
    common_C = _is_common(own_C)
    generator = keyed_generator(seed, "", "bounded", 0, len(own_C), int(common_C.sum()))
    shape, scale = (
        n_C[common_C].sum() ** 2 / (n_C[common_C] ** 2).sum(),
        (n_C[common_C] ** 2).sum() / n_C[common_C].sum(),
    )
    apart_BP = generator.standard_exponential((NUM_BOUNDED_DRAWS, int((~common_C).sum()))) * n_C[~common_C]
    common_B = generator.gamma(shape, scale, NUM_BOUNDED_DRAWS)
    unseen_B = generator.standard_exponential(NUM_BOUNDED_DRAWS) * n_C.mean()
    total_B = apart_BP.sum(1) + common_B + unseen_B
    seen_B = apart_BP @ own_C[~common_C] + common_B * np.median(own_C[common_C])
    low, high = ((seen_B + unseen_B * limit) / total_B for limit in bounds)
    # the weights' rounding must not push an end past its limit
    return max(bounds[0], float(np.quantile(low, tail))), min(bounds[1], float(np.quantile(high, 1 - tail)))


def resampling_weights(
    num_clusters: int, num_resamples: int, seed: int, purpose: str = "bootstrap"
) -> NDArray[np.float64]:
    """How often each patient occurs in each resample: whole numbers (B,C), every row sums to C. Depends on the
    arguments only."""
    generator = keyed_generator(seed, "", purpose, 0, num_clusters, num_resamples)
    return generator.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=num_resamples).astype(
        np.float64
    )


def _by_pattern(present_CK: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
    """Columns that are scored for the same patients, together, a bounded number at once."""
    patterns, of_column = np.unique(present_CK, axis=1, return_inverse=True)
    for p in range(patterns.shape[1]):
        columns = np.flatnonzero(of_column.ravel() == p)
        for start in range(0, len(columns), _COLUMNS_AT_ONCE):
            yield patterns[:, p], columns[start : start + _COLUMNS_AT_ONCE]


def _standard_errors(residuals_Ck: NDArray[np.float64], n_Ck: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linearised standard error of a ratio of patient sums."""
    num = len(n_Ck)
    errors: NDArray[np.float64] = np.sqrt(num / (num - 1) * (residuals_Ck**2).sum(0)) / n_Ck.sum(0)
    return errors


def _studentised_or_edgeworth(
    residuals_Ck: NDArray[np.float64],
    n_Ck: NDArray[np.float64],
    errors_k: NDArray[np.float64],
    tail: float,
    seed: int,
    num_resamples: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[Method]]:
    """Ends of the intervals relative to the mean; infinite where too many resamples have no spread."""
    num = len(n_Ck)
    student = float(stdtrit(num - 1, 1 - tail)) * errors_k
    if num > MAX_BOOTSTRAP_CLUSTERS:
        spread = np.sqrt((residuals_Ck**2).mean(0))
        skewness = np.divide((residuals_Ck**3).mean(0), spread**3, out=np.zeros_like(spread), where=spread > 0)
        z = float(ndtri(1 - tail))
        shift = skewness * (2 * z * z + 1) / (6 * np.sqrt(num))
        low, high = (shift - z) * errors_k, (shift + z) * errors_k
        return np.minimum(low, -student), np.maximum(high, student), ["edgeworth"] * len(errors_k)
    weights_BC = resampling_weights(num, num_resamples, seed)
    total_Bk = weights_BC @ n_Ck
    shift_Bk = (weights_BC @ residuals_Ck) / total_Bk
    squares_Bk = (
        weights_BC @ residuals_Ck**2
        - 2 * shift_Bk * (weights_BC @ (residuals_Ck * n_Ck))
        + shift_Bk**2 * (weights_BC @ n_Ck**2)
    )
    error_Bk = np.sqrt(num / (num - 1) * np.maximum(squares_Bk, 0.0)) / total_Bk
    flat = error_Bk <= _FLAT * np.maximum(errors_k, np.finfo(float).tiny)
    t_Bk = np.where(flat, np.where(shift_Bk > 0, np.inf, -np.inf), shift_Bk / np.where(flat, 1.0, error_Bk))
    low_t, high_t = np.quantile(t_Bk, [tail, 1 - tail], axis=0, method="inverted_cdf")
    with np.errstate(invalid="ignore"):  # no spread at all times an infinite quantile
        low, high = np.minimum(-high_t * errors_k, -student), np.maximum(-low_t * errors_k, student)
    return low, high, ["studentised"] * len(errors_k)


def _is_common(own_C: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which patients have the most common value, equal but for rounding."""
    largest = float(np.abs(own_C).max())
    rounded_C = np.round(own_C / (largest or 1.0), _SAME_DIGITS)
    values, counts = np.unique(rounded_C, return_counts=True)
    common: NDArray[np.bool_] = rounded_C == values[counts.argmax()]
    return common


def _effective_number(scored: NDArray[np.float64], error: float, num_clusters: int) -> float:
    """Number of independent images that would give this standard error of a share; the number of patients where it
    has none."""
    share = scored.mean()
    if not error > 0:
        return float(num_clusters)
    return float(min(scored.size, share * (1 - share) / error**2))

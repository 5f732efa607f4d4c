"""Scores with their patients in, means with honest 95% intervals out.

Images of one patient are alike, so patients are resampled, not images (cluster bootstrap; Davison & Hinkley 1997,
section 3.8). The mean over images is a ratio of patient sums, and its bootstrap distribution is studentised (Efron
1981; Hall 1988, "Theoretical comparison of bootstrap confidence intervals", Annals of Statistics 16), which keeps
its coverage for skewed scores where percentile intervals and, at 30 images, BCa fall short.

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

_COLUMNS_AT_ONCE: Final = 256
_FLAT: Final = 1e-6
"""A resample whose spread is below this share of the sample's has none: what is left is rounding."""

Method = Literal["studentised", "bca", "edgeworth", "wilson", "constant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A confidence interval, in the unit of the score, and how it was made."""

    low: float
    high: float
    method: Method


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One column of scores. `mean`, `median` and `sd` are NaN where nothing is scored; `interval` is None below
    MIN_CLUSTERS patients. `standard_error` allows for patients with several images."""

    mean: float
    median: float
    sd: float
    standard_error: float
    interval: Interval | None
    num_scored: int
    num_not_scored: int
    num_clusters: int


def summarise(
    values_IK: NDArray[np.float64],
    clusters_I: NDArray[np.int64],
    *,
    seed: int,
    bounds_K: Sequence[tuple[float, float]] | None = None,
    hits_K: Sequence[bool] | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[Summary, ...]:
    """Mean, median, spread and interval of each column; NaN entries are counted as not scored and left out.

    bounds_K: the metric's range, to which an interval is clipped; hits_K: see `mean_intervals`. The same seed and
    number of patients give the same resamples for every column, so that columns of one table are comparable.

    >>> import numpy as np
    >>> summarise(np.arange(40.0)[:, None], np.arange(40), seed=0)[0].mean
    19.5
    """
    means, errors, lows, highs, methods, num_clusters = mean_intervals(
        values_IK, clusters_I, seed=seed, hits_K=hits_K, confidence=confidence, num_resamples=num_resamples
    )
    summaries = []
    for k in range(values_IK.shape[1]):
        scored = values_IK[np.isfinite(values_IK[:, k]), k]
        low, high = bounds_K[k] if bounds_K else (-np.inf, np.inf)
        method = methods[k]
        interval = Interval(low=max(low, lows[k]), high=min(high, highs[k]), method=method) if method else None
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
            )
        )
    return tuple(summaries)


def mean_intervals(
    values_IK: NDArray[np.float64],
    clusters_I: NDArray[np.int64],
    *,
    seed: int,
    hits_K: Sequence[bool] | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[float], list[float], list[Method | None], NDArray[np.int64]]:
    """Return means, standard errors, lower and upper ends, method (None: no interval) and number of patients per
    column.

    Hits and misses (all 0 or 1; `hits_K` says of which columns that is the scale, None: of all) get the Wilson interval
    with the number of images deflated by the design effect, and Student's quantile where patients have several images.
    Other scores that are all equal get that one point (`constant`).
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
        for j, k in enumerate(columns):
            scored = values_IK[np.isfinite(values_IK[:, k]), k]
            if (hits_K is None or hits_K[k]) and np.isin(scored, (0.0, 1.0)).all():
                z = float(ndtri(1 - tail) if num == scored.size else stdtrit(num - 1, 1 - tail))
                lows[k], highs[k] = wilson(float(means[k]), _effective_number(scored, float(errors[k]), num), z)
                methods[k] = "wilson"
            elif scored.min() == scored.max():
                lows[k] = highs[k] = float(means[k])
                methods[k] = "constant"
            else:
                lows[k], highs[k] = float(means[k] + low[j]), float(means[k] + high[j])
                methods[k] = how[j]
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
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * np.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


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
    """Ends of the intervals relative to the mean."""
    num = len(n_Ck)
    if num > MAX_BOOTSTRAP_CLUSTERS:
        spread = np.sqrt((residuals_Ck**2).mean(0))
        skewness = np.divide((residuals_Ck**3).mean(0), spread**3, out=np.zeros_like(spread), where=spread > 0)
        z = float(ndtri(1 - tail))
        shift = skewness * (2 * z * z + 1) / (6 * np.sqrt(num))
        return (shift - z) * errors_k, (shift + z) * errors_k, ["edgeworth"] * len(errors_k)
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
    t_Bk[flat & (np.abs(shift_Bk) <= _FLAT * errors_k)] = 0.0
    low_t, high_t = np.quantile(t_Bk, [tail, 1 - tail], axis=0, method="inverted_cdf")
    low, high = -high_t * errors_k, -low_t * errors_k
    how: list[Method] = ["studentised"] * len(errors_k)
    for j in np.flatnonzero(~(np.isfinite(low) & np.isfinite(high))):
        low[j], high[j] = _bca(shift_Bk[:, j], residuals_Ck[:, j], n_Ck[:, j], tail)
        how[j] = "bca"
    return low, high, how


def _bca(
    shift_B: NDArray[np.float64], residuals_C: NDArray[np.float64], n_C: NDArray[np.float64], tail: float
) -> tuple[float, float]:
    """Bias-corrected accelerated ends relative to the mean (Efron 1987), for scores of so few values that some
    resamples have no spread and a studentised quantile is infinite."""
    total = n_C.sum()
    left_out = -residuals_C / (total - n_C)
    centred = left_out.mean() - left_out
    spread = (centred**2).sum() ** 1.5
    acceleration = (centred**3).sum() / (6 * spread) if spread > 0 else 0.0
    below = (shift_B < 0).mean() + 0.5 * (shift_B == 0).mean()
    bias = float(ndtri(np.clip(below, 1 / len(shift_B), 1 - 1 / len(shift_B))))
    shifted = bias + ndtri([tail, 1 - tail])
    levels = ndtr(bias + shifted / (1 - acceleration * shifted))
    low, high = np.quantile(shift_B, levels)
    return float(low), float(high)


def _effective_number(scored: NDArray[np.float64], error: float, num_clusters: int) -> float:
    """Number of independent images that would give this standard error of a share; the number of patients where it
    has none."""
    share = scored.mean()
    if not error > 0:
        return float(num_clusters)
    return float(min(scored.size, share * (1 - share) / error**2))

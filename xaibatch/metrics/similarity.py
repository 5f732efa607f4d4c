"""Two equally long vectors in, one number out: correlations and structural similarity in float64 NumPy, without SciPy.

A coefficient that is undefined (a constant vector) raises NotScoredError instead of returning NaN or 0.
Shape letters: N entries.
"""

from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from xaibatch.errors import NotScoredError
from xaibatch.metrics.ties import levels
from xaibatch.types import ZERO_DENOMINATOR

Correlation = Literal["pearson", "spearman"]

FLAT: Final = 1e-12
"""A vector whose spread is below this share of its largest magnitude is rounding noise around a constant."""


def correlation(a_N: NDArray[np.floating], b_N: NDArray[np.floating], how: Correlation) -> float:
    """Pearson's r, or Spearman's rho (Pearson's r of mean ranks), in [-1, 1]."""
    return pearson(a_N, b_N) if how == "pearson" else spearman(a_N, b_N)


def pearson(a_N: NDArray[np.floating], b_N: NDArray[np.floating]) -> float:
    """Pearson's r; raises NotScoredError(zero_denominator) where either vector is constant."""
    unit_a, unit_b = _centred_unit(a_N, "first"), _centred_unit(b_N, "second")
    return float(np.clip(unit_a @ unit_b, -1, 1))


def spearman(a_N: NDArray[np.floating], b_N: NDArray[np.floating]) -> float:
    """Spearman's rho with mean ranks for ties."""
    return pearson(mean_ranks(a_N), mean_ranks(b_N))


def mean_ranks(values_N: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks from 1, values equal but for rounding (see `ties.TIE`) sharing the mean of theirs.

    >>> mean_ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    level_N = levels(values_N)
    size_L = np.bincount(level_N)
    ranks_N: NDArray[np.float64] = (np.cumsum(size_L) - (size_L - 1) / 2)[level_N]
    return ranks_N


def _centred_unit(values_N: NDArray[np.floating], which: str) -> NDArray[np.float64]:
    values = np.asarray(values_N, np.float64)
    if len(values) < 2:
        raise NotScoredError(ZERO_DENOMINATOR, f"a correlation needs two points, received {len(values)}")
    centred = values - values.mean()
    norm = np.linalg.norm(centred)
    if not norm > FLAT * np.abs(values).max() * np.sqrt(len(values)):
        raise NotScoredError(ZERO_DENOMINATOR, f"the {which} of the two correlated vectors is constant")
    unit: NDArray[np.float64] = centred / norm
    return unit


def structural_similarity(
    a: NDArray[np.floating], b: NDArray[np.floating], window: int = 7, k1: float = 0.01, k2: float = 0.03
) -> float:
    """Mean SSIM of two arrays of one or two axes, in [-1, 1] (Wang et al. 2004, equation 13).

    Uniform window, sample covariance, the data range of both arrays together; the mean leaves out the border where the
    window does not fit. These are scikit-image's defaults, and how Quantus calls it. Raises
    NotScoredError(zero_denominator) where both arrays are one and the same constant.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    data_range = max(a.max(), b.max()) - min(a.min(), b.min())
    if data_range == 0:
        raise NotScoredError(ZERO_DENOMINATOR, "structural similarity of two equal constant maps")
    num_window = window**a.ndim
    to_sample = num_window / (num_window - 1)
    mean_a, mean_b = window_mean(a, window), window_mean(b, window)
    var_a = to_sample * (window_mean(a * a, window) - mean_a**2)
    var_b = to_sample * (window_mean(b * b, window) - mean_b**2)
    cov = to_sample * (window_mean(a * b, window) - mean_a * mean_b)
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(similarity.mean())


def window_mean(values: NDArray[Any], window: int) -> NDArray[np.float64]:
    """Mean over every full window of `window` entries along each axis; each axis shrinks by window - 1."""
    for axis in range(values.ndim):
        values = np.lib.stride_tricks.sliding_window_view(values, window, axis).mean(-1)
    return values

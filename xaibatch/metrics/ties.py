"""Values in, which of them are equal but for rounding out: levels, and an order in which such ties go by position.

Maps paint one value over a whole superpixel or interpolate between equal tokens, and a mean over 30 equal pixels is not
bit for bit the mean over 31 of them. Ordered as they come, such values are ranked by the last bit of the arithmetic,
which changes with the batch size. Shape letters: N entries, L levels.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

TIE: Final = 1e-12
"""How close tied values are, as a share of the largest magnitude: fifty times the error of a regression on superpixels
in float64. Two float32 numbers tie only where they are neighbours below 2e-5 of the largest."""


def ordered(values_N: NDArray[np.floating]) -> NDArray[np.int64]:
    """Entries from the smallest to the largest, ties by position, int (N,).

    >>> ordered(np.array([0.3, 0.1 + 0.2, -1.0])).tolist(), ordered(np.array([0.1 + 0.2, 0.3, -1.0])).tolist()
    ([2, 0, 1], [2, 0, 1])
    """
    order_N = np.argsort(values_N, kind="stable")
    above_N = _above(values_N[order_N])
    if (np.diff(values_N[order_N])[~above_N] == 0).all():
        return order_N
    return np.argsort(_levels(order_N, above_N), kind="stable")


def levels(values_N: NDArray[np.floating]) -> NDArray[np.int64]:
    """The number of each value's level from 0, the smallest; tied values share one, int (N,).

    >>> levels(np.array([0.3, 0.1 + 0.2, -1.0])).tolist()
    [1, 1, 0]
    """
    order_N = np.argsort(values_N, kind="stable")
    return _levels(order_N, _above(values_N[order_N]))


def _above(sorted_N: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each value but the first lies on a higher level than its predecessor (N-1,).

    Close neighbours are tied if the whole run of them is no wider than TIE. A wider run is no tie but a continuum, as
    all the small values of a map with one enormous peak: there only equal values are tied.
    """
    if not len(sorted_N):
        return np.zeros(0, bool)
    gap_N, tie = np.diff(sorted_N), TIE * np.abs(sorted_N).max()
    above_N: NDArray[np.bool_] = gap_N > tie
    first_L = np.flatnonzero(np.concatenate([[True], above_N]))
    last_L = np.append(first_L[1:], len(sorted_N)) - 1
    wide_L = sorted_N[last_L] - sorted_N[first_L] > tie
    return above_N | (np.repeat(wide_L, last_L - first_L + 1)[1:] & (gap_N > 0))


def _levels(order_N: NDArray[np.int64], above_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    level_N = np.zeros(len(order_N), np.int64)
    level_N[order_N[1:]] = np.cumsum(above_N)
    return level_N

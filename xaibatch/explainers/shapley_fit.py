"""Coalitions of superpixels and the model's answers in, Shapley values out (KernelSHAP); NumPy only, float64.

Shape letters: S coalitions, M superpixels (players), K columns of values.
"""

from math import comb

import numpy as np
from numpy.typing import NDArray


def shapley_kernel(num_players: int, size: int) -> float:
    """The weight of one coalition of `size` players, 0 < size < M (Lundberg & Lee 2017, theorem 2)."""
    return (num_players - 1) / (comb(num_players, size) * size * (num_players - size))


def draw_coalitions(
    generator: np.random.Generator, num_samples: int, num_players: int, paired: bool
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return which superpixels each copy shows, bool (S,M), and each coalition's weight in the regression (S,).

    Row 0 shows everything and row 1 nothing; both have weight 0 because the solution meets them exactly. If
    `num_samples` reaches 2^M, every coalition comes once with its Shapley kernel weight and the answer is exact (S
    is then 2^M). Otherwise sizes are drawn in proportion to the kernel's total per size, 1 / (k (M - k)), and
    members uniformly, so that every drawn row weighs 1. `paired` lets each drawn coalition be followed by its
    complement (Covert & Lee 2021, sec. 4.2).
    """
    ends = np.array([[True] * num_players, [False] * num_players])
    if num_players == 1:
        return ends, np.zeros(2)
    if num_players < 63 and num_samples >= 2**num_players:
        codes = np.arange(1, 2**num_players - 1)
        inner = (codes[:, None] >> np.arange(num_players) & 1).astype(bool)
        kernel = np.array([0.0, *(shapley_kernel(num_players, size) for size in range(1, num_players))])
        return np.concatenate([ends, inner]), np.concatenate([np.zeros(2), kernel[inner.sum(1)]])
    free = num_samples - 2
    drawn = (free + 1) // 2 if paired else free
    sizes = np.arange(1, num_players)
    share = 1.0 / (sizes * (num_players - sizes))
    size_S = generator.choice(sizes, drawn, p=share / share.sum())
    inner = generator.random((drawn, num_players)).argsort(1).argsort(1) < size_S[:, None]
    if paired:
        inner = np.stack([inner, ~inner], 1).reshape(-1, num_players)[:free]
    return np.concatenate([ends, inner]), np.concatenate([np.zeros(2), np.ones(free)])


def solve_shapley(
    keep_SM: NDArray[np.bool_], values_SK: NDArray[np.float64], weights_S: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the Shapley values (M,K) of the coalitions drawn by `draw_coalitions` and the model's values for them.

    Weighted least squares of v(S) - v(∅) on membership under the constraint that the values add up to v(all) - v(∅)
    (Covert & Lee 2021, eq. 5-6). The constraint is met exactly: the values are written as an even split plus a
    deviation that adds up to nought, and only the deviation is fitted. With fewer distinct coalitions than
    superpixels the solution nearest to the even split is taken.
    """
    num_players = keep_SM.shape[1]
    total_K = values_SK[0] - values_SK[1]
    even_MK = np.tile(total_K / num_players, (num_players, 1))
    root_S1 = np.sqrt(weights_S)[:, None]
    member_SM = keep_SM.astype(np.float64)
    centred_SM = member_SM - member_SM.mean(1, keepdims=True)  # membership seen by deviations that add up to nought
    rest_SK = values_SK - values_SK[1] - member_SM @ even_MK
    deviation_MK, *_ = np.linalg.lstsq(root_S1 * centred_SM, root_S1 * rest_SK, rcond=None)
    return even_MK + deviation_MK - deviation_MK.mean(0)


def additive_r2(
    keep_SM: NDArray[np.bool_],
    values_SK: NDArray[np.float64],
    weights_S: NDArray[np.float64],
    shapley_MK: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Weighted R² (K,) of v(∅) + sum of the members' Shapley values; NaN where the model's value does not vary."""
    if not weights_S.any():
        return np.full(values_SK.shape[1], np.nan)
    residual_SK = values_SK - values_SK[1] - keep_SM @ shapley_MK
    total_SK = values_SK - np.average(values_SK, axis=0, weights=weights_S)
    residual_K, total_K = weights_S @ residual_SK**2, weights_S @ total_SK**2
    return np.where(total_K > 0, 1.0 - residual_K / np.where(total_K > 0, total_K, 1.0), np.nan)

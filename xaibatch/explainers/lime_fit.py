"""Superpixel samples and the model's probabilities in, LIME's local linear model out; NumPy only, float64.

The arithmetic is that of the `lime` package 0.2 (LimeImageExplainer with its defaults: cosine distance, exponential
kernel, ridge regression with alpha 1 on all superpixels), solved in closed form for all classes at once.

Shape letters: S samples, M superpixels, K classes, H W pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LIME_RIDGE_ALPHA = 1.0
"""The ridge penalty of lime's local model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFit:
    """LIME's answer for one image, all classes.

    weights_MK:   effect of showing a superpixel on the class's probability (positive: raises it).
    intercept_K:  the local model's value with everything hidden.
    r2_K:         weighted coefficient of determination, at most 1; 1 for a probability that does not vary.
    local_K:      the local model's probability for the image itself.
    """

    weights_MK: NDArray[np.float64]
    intercept_K: NDArray[np.float64]
    r2_K: NDArray[np.float64]
    local_K: NDArray[np.float64]


def draw_samples(
    generator: np.random.Generator, num_samples: int, num_segments: int, antithetic: bool = False
) -> NDArray[np.bool_]:
    """Return which superpixels each copy shows, bool (S,M); row 0 is the image itself.

    Every entry is a fair coin, as in `lime`. `antithetic` draws half as many rows and lets each be followed by its
    complement: what the model's answer has in common for a sample and its complement then cancels from the weights
    instead of adding noise (exactly so but for the proximity weights).
    """
    keep_SM = np.ones((num_samples, num_segments), bool)
    free = num_samples - 1
    if not antithetic:
        keep_SM[1:] = generator.integers(0, 2, (free, num_segments), dtype=np.uint8)
        return keep_SM
    drawn = generator.integers(0, 2, ((free + 1) // 2, num_segments), dtype=np.uint8).astype(bool)
    keep_SM[1:] = np.stack([drawn, ~drawn], 1).reshape(-1, num_segments)[:free]
    return keep_SM


def proximity(keep_SM: NDArray[np.bool_], kernel_width: float) -> NDArray[np.float64]:
    """Return each sample's weight (S,): sqrt(exp(-d² / kernel_width²)), d the cosine distance to the full image.

    The cosine of a 0/1 row with k ones to the row of M ones is sqrt(k / M); a row of zeros has distance 1.
    """
    distance = 1.0 - np.sqrt(keep_SM.mean(1, dtype=np.float64))
    weights: NDArray[np.float64] = np.sqrt(np.exp(-(distance**2) / kernel_width**2))
    return weights


def fit_local_model(
    keep_SM: NDArray[np.bool_], probabilities_SK: NDArray[np.floating], kernel_width: float = 0.25
) -> LocalFit:
    """Fit LIME's local model to every class (Ribeiro et al. 2016, eq. 1-2, as the `lime` package solves it).

    Ridge regression with intercept on weighted samples: data and probabilities are centred by their weighted means and
    the M x M normal equations (Gram matrix + alpha) are solved once for all classes. `lime` first orders the
    superpixels by a second ridge fit; with all of them kept this changes nothing but exact ties, so it is left out.
    Where a probability does not vary all weights are exactly zero (`lime` gives the rounding of its sums, about 1e-17).
    """
    weights_S = proximity(keep_SM, kernel_width)
    share_S = weights_S / weights_S.sum()
    data_SM = keep_SM.astype(np.float64)
    targets_SK = np.asarray(probabilities_SK, np.float64)
    data_mean_M, target_mean_K = share_S @ data_SM, share_S @ targets_SK
    centred_SM, centred_SK = data_SM - data_mean_M, targets_SK - target_mean_K
    weighted_SM = centred_SM * weights_S[:, None]
    gram_MM = weighted_SM.T @ centred_SM
    gram_MM[np.diag_indices_from(gram_MM)] += LIME_RIDGE_ALPHA
    varies = np.ptp(targets_SK, axis=0) > 0
    weights_MK = np.where(varies, np.linalg.solve(gram_MM, weighted_SM.T @ centred_SK), 0.0)
    intercept_K = target_mean_K - data_mean_M @ weights_MK
    residual_K = weights_S @ (centred_SK - centred_SM @ weights_MK) ** 2
    total_K = weights_S @ centred_SK**2
    r2_K = np.where(varies, 1.0 - residual_K / np.where(varies, total_K, 1.0), 1.0)
    return LocalFit(weights_MK=weights_MK, intercept_K=intercept_K, r2_K=r2_K, local_K=intercept_K + weights_MK.sum(0))


def top_k_mask(weights_M: NDArray[np.float64], segments_HW: NDArray[np.int32], top_k: int) -> NDArray[np.float64]:
    """Return 1 on the `top_k` superpixels of largest positive weight and 0 elsewhere, float64 (H,W).

    As ImageExplanation.get_image_and_mask(positive_only=True, num_features=top_k, hide_rest=False): fewer than `top_k`
    superpixels where fewer are positive, and all zeros where none is.
    """
    chosen = np.zeros(len(weights_M))
    best = np.argsort(-weights_M, kind="stable")[:top_k]
    chosen[best[weights_M[best] > 0]] = 1.0
    return chosen[segments_HW]

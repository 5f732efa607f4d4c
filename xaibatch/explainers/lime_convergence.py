"""How many samples LIME needs: a model's answers on superpixel samples in, error against a large reference out; pure.

Shape letters: S samples, M superpixels, K classes, N sample sizes, R repeats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xaibatch.explainers.lime_fit import draw_samples, fit_local_model
from xaibatch.maps import repeat_agreement
from xaibatch.seeding import DrawKey

REFERENCE_SAMPLES = 5000
"""Size of the reference sample that errors are measured against."""

Probabilities = Callable[[NDArray[np.bool_]], NDArray[np.floating]]
"""Superpixels to show, bool (S,M) -> the model's probabilities (S,K)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LimeConvergence:
    """Relative errors ||w - w_ref|| / ||w_ref|| of LIME's weights for one image and class.

    sizes_N:         numbers of samples.
    independent_RN:  errors of independent samples, one row per repeat.
    antithetic_RN:   errors of antithetic samples (lime_fit.draw_samples).
    agreement_N, antithetic_agreement_N: see `repeat_agreement`.
    """

    sizes_N: NDArray[np.int64]
    independent_RN: NDArray[np.float64]
    antithetic_RN: NDArray[np.float64]
    agreement_N: NDArray[np.float64]
    antithetic_agreement_N: NDArray[np.float64]


def measure_convergence(
    probabilities: Probabilities,
    *,
    key: DrawKey,
    num_segments: int,
    target: int,
    sizes: Sequence[int],
    num_repeats: int = 5,
    num_reference: int = REFERENCE_SAMPLES,
    kernel_width: float = 0.25,
) -> LimeConvergence:
    """Measure LIME's error at several sample sizes with independent and with antithetic samples.

    The reference has `num_reference` independent samples of its own draws. Each repeat draws max(sizes) samples once
    per kind, and a smaller size takes its first rows, so the model is asked num_reference + 2 * num_repeats *
    max(sizes) times.
    """
    sizes_N = np.array(sorted(sizes), np.int64)

    def fitted(keep_SM: NDArray[np.bool_], answers_SK: NDArray[np.floating]) -> NDArray[np.float64]:
        return fit_local_model(keep_SM, answers_SK, kernel_width).weights_MK[:, target]

    reference_SM = draw_samples(key.generator("lime_reference"), num_reference, num_segments)
    reference_M = fitted(reference_SM, probabilities(reference_SM))
    weights: dict[bool, NDArray[np.float64]] = {}
    for antithetic in (False, True):
        runs = []
        for repeat in range(num_repeats):
            generator = key.generator(f"lime_convergence:{antithetic}:{repeat}")
            keep_SM = draw_samples(generator, int(sizes_N[-1]), num_segments, antithetic)
            answers_SK = probabilities(keep_SM)
            runs.append([fitted(keep_SM[:size], answers_SK[:size]) for size in sizes_N])
        weights[antithetic] = np.array(runs)
    errors = {kind: np.linalg.norm(w_RNM - reference_M, axis=2) for kind, w_RNM in weights.items()}
    scale = np.linalg.norm(reference_M)
    agreement = {kind: [repeat_agreement(w_RNM[:, n]) for n in range(len(sizes_N))] for kind, w_RNM in weights.items()}
    return LimeConvergence(
        sizes_N=sizes_N,
        independent_RN=errors[False] / scale,
        antithetic_RN=errors[True] / scale,
        agreement_N=np.array(agreement[False]),
        antithetic_agreement_N=np.array(agreement[True]),
    )


def equal_error_sizes(
    sizes_N: NDArray[np.int64], error_N: NDArray[np.float64], other_error_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the sizes at which the other method's error reaches `error_N`; both errors should fall with the size.

    >>> sizes = np.array([100, 200, 400])
    >>> equal_error_sizes(sizes, sizes**-0.5, 0.5**0.5 * sizes**-0.5).round(6)
    array([ nan, 100., 200.])
    """
    falling_N = np.minimum.accumulate(other_error_N)
    logs = np.interp(-np.log(error_N) + 0.0, -np.log(falling_N), np.log(sizes_N), left=np.nan, right=np.nan)
    return np.exp(logs)

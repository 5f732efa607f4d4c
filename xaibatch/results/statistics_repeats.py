"""Scores of repeated draws in, the share of the variance that is sampling noise out.

One-way random-effects analysis of variance with images as groups and repeats within them (unbalanced form: Searle,
Casella & McCulloch 1992, section 3.6): a single score varies by the image and, if explainer or metric draw random
numbers, by the draw.

Shape letters: I images, R repeats, C patients, B resamples.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from xaibatch.results.statistics import MIN_CLUSTERS, NUM_RESAMPLES, resampling_weights

_ROUNDING: Final = 1e-12
"""Share of the sum of squares below which repeats are equal but for rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseShare:
    """share: within-image variance over the whole variance of one score (0: repeats agree, 1: nothing but noise);
    `low`, `high` its 95% interval (percentiles over resampled patients; None below MIN_CLUSTERS). share_of_mean: the
    same for the mean over the repeats that the run has, which is what the tables show."""

    share: float
    low: float | None
    high: float | None
    share_of_mean: float
    num_images: int
    num_repeats: float


def noise_share(
    values_IR: NDArray[np.float64], clusters_I: NDArray[np.int64], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> NoiseShare | None:
    """Estimate from images with at least two scored repeats (NaN: not scored); None where fewer than two images have
    them.

    A between-image variance that comes out negative counts as zero, so that the share is one.
    """
    number_I = np.isfinite(values_IR).sum(1)
    used = number_I >= 2
    if used.sum() < 2:
        return None
    values, number = values_IR[used], number_I[used].astype(np.float64)
    centre = np.nanmean(values)
    totals = np.nansum(values - centre, axis=1)
    within = np.nansum((values - centre) ** 2, axis=1) - totals**2 / number
    parts_IP = np.stack([np.ones_like(number), number, number**2, totals, totals**2 / number, np.maximum(within, 0)], 1)
    order = np.argsort(clusters_I[used], kind="stable")
    starts = np.flatnonzero(np.diff(clusters_I[used][order], prepend=-1))
    parts_C = np.add.reduceat(parts_IP[order], starts, axis=0)
    share, share_of_mean = _shares(parts_C.sum(0)[None])
    low = high = None
    if len(parts_C) >= MIN_CLUSTERS:
        resampled = _shares(resampling_weights(len(parts_C), num_resamples, seed, "repeats") @ parts_C)[0]
        low, high = (float(v) for v in np.nanquantile(resampled, [0.025, 0.975]))
    return NoiseShare(
        share=float(share[0]),
        low=low,
        high=high,
        share_of_mean=float(share_of_mean[0]),
        num_images=int(used.sum()),
        num_repeats=float(number.mean()),
    )


def _shares(parts_B: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of single scores and of means from sums over images of 1, n, n², Σx, (Σx)²/n and the within sum of
    squares."""
    images, scores, squares, total, between, within = parts_B.T
    mean_within = within / (scores - images)
    mean_between = np.maximum(between - total**2 / scores, 0) / np.maximum(images - 1, 1)
    mean_within = np.where(within > _ROUNDING * (between + within), mean_within, 0.0)
    repeats = (scores - squares / scores) / np.maximum(images - 1, 1)
    variance = np.maximum(mean_between - mean_within, 0) / repeats
    whole = variance + mean_within
    of_mean = variance + mean_within / repeats
    still = whole <= np.finfo(float).tiny
    share = np.where(still, 0.0, mean_within / np.where(still, 1.0, whole))
    share_of_mean = np.where(still, 0.0, mean_within / repeats / np.where(still, 1.0, of_mean))
    return share, share_of_mean

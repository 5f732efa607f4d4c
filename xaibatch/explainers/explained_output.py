"""Logits of perturbed copies in, the one number per copy that an explainer explains out; NumPy only, float64.

Shape letters: S samples, K classes.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Output = Literal["probability", "logit"]
"""What is explained: the target's probability (see `probabilities`), or its logit."""

ROUNDING = 32
"""A spread of so many units in the last place is rounding: equal copies at other places of a batch differ by up to
10."""


def probabilities(logits_SK: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return each copy's probabilities, float64 (S,K) whatever the logits' precision: softmax, for one class sigmoid.

    A class whose logit or probability differs between the copies by rounding only has the first copy's value
    everywhere.
    """
    logits = np.asarray(_without_rounding(logits_SK, np.abs(logits_SK).max()), np.float64)
    if logits.shape[1] == 1:
        logits = np.concatenate([logits, np.zeros_like(logits)], 1)  # the sigmoid as a softmax against zero
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    shares_SK = (powers / powers.sum(-1, keepdims=True))[:, : np.shape(logits_SK)[1]]
    return np.asarray(_without_rounding(shares_SK, shares_SK.max(0)), np.float64)


def explained_output(logits_SK: NDArray[np.floating], target: int, output: Output) -> NDArray[np.float64]:
    """Return the target's probability or logit for each copy, float64 (S,); exactly constant where only rounding
    differs."""
    if output == "probability":
        return probabilities(logits_SK)[:, target]
    return np.asarray(_without_rounding(logits_SK, np.abs(logits_SK).max())[:, target], np.float64)


def _without_rounding(values_SK: NDArray[np.floating], size_K: NDArray[np.floating]) -> NDArray[np.floating]:
    """The values, but for columns whose spread over the samples is rounding of numbers of `size`: these are constant.

    An explainer would turn the rounding of a constant output into a map, and a mask of its best superpixels would look
    like any other.
    """
    tolerance_K = ROUNDING * np.finfo(values_SK.dtype).eps * size_K
    return np.where(np.ptp(values_SK, axis=0) <= tolerance_K, values_SK[0], values_SK)

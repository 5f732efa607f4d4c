"""Logits of perturbed copies in, the one number per copy that an explainer explains out; NumPy only, float64.

Shape letters: S samples, K classes.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Output = Literal["probability", "logit"]
"""What is explained: the target's softmax probability, or its logit."""


def softmax(logits_SK: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the probabilities in float64 whatever the logits' precision."""
    shifted = np.asarray(logits_SK, np.float64)
    powers = np.exp(shifted - shifted.max(-1, keepdims=True))
    probabilities: NDArray[np.float64] = powers / powers.sum(-1, keepdims=True)
    return probabilities


def explained_output(logits_SK: NDArray[np.floating], target: int, output: Output) -> NDArray[np.float64]:
    """Return the target's probability or logit for each copy, float64 (S,)."""
    values_SK = softmax(logits_SK) if output == "probability" else np.asarray(logits_SK, np.float64)
    return values_SK[:, target]

"""How metrics read a map and a model's output: the map's checks, sign and scale, the logit or the probability.

Shape letters: H W pixels, K classes, S samples of a plan.
"""

from math import inf
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from xaibatch.errors import NotScoredError
from xaibatch.maps import on_pixels
from xaibatch.metrics.base import ImageView, MapView
from xaibatch.options import Options
from xaibatch.types import ALL_ZERO_MAP, NAN_MAP

Output = Literal["logit", "probability"]
"""What is read of the model: the class's logit, or its probability (see `model_output`)."""

ScoredClass = Literal["label", "predicted"]
"""Whose output is read: the true label's, or that of the class predicted for the unperturbed image."""


class MapReading(Options):
    """Options of every metric that reads a map as Quantus does."""

    abs: bool = False
    """Score |map| instead of the signed map."""
    normalise: bool = True
    """Divide each map by its own largest magnitude first (Quantus: by the largest of the whole call)."""


def readable(values_HW: NDArray[np.floating]) -> NDArray[np.float64]:
    """The map in float64; raises NotScoredError where it has NaN or infinite values or is zero everywhere."""
    values = np.asarray(values_HW, np.float64)
    if not np.isfinite(values).all():
        raise NotScoredError(
            NAN_MAP, f"{int((~np.isfinite(values)).sum())} of the map's {values.size} values are not finite"
        )
    if not values.any():
        raise NotScoredError(ALL_ZERO_MAP, "the map is zero everywhere")
    return values


def read_map(pixels_HW: NDArray[np.floating], reading: MapReading) -> NDArray[np.float64]:
    """The pixel map as a metric's options want it: scaled, then made absolute; checked by `readable`."""
    values = readable(pixels_HW)
    if reading.normalise:
        values = values / np.abs(values).max()
    return np.abs(values) if reading.abs else values


def own_pixels(view: MapView, map_hw: NDArray[np.floating] | None = None) -> NDArray[np.float64]:
    """The explainer's own map (H,W), or another of its maps, upsampled but never shifted or scaled.

    The run's min-max normalisation would turn evidence against the class into evidence for it, so it is left out here.
    """
    return on_pixels(readable(view.map_hw if map_hw is None else map_hw), view.shape_CHW[1:], view.map_options)


def positive_mass(view: MapView, map_hw: NDArray[np.floating] | None = None) -> NDArray[np.float64]:
    """Positive part (H,W) of `own_pixels`."""
    return np.maximum(own_pixels(view, map_hw), 0)


def model_output(logits_xK: NDArray[np.floating], output: Output) -> NDArray[np.float64]:
    """Logits, or probabilities over the last axis, in float64: softmax, for one class sigmoid; any leading axes."""
    logits = np.asarray(logits_xK, np.float64)
    if output == "logit":
        return logits
    if logits.shape[-1] == 1:
        return np.asarray(np.exp(-np.logaddexp(0, -logits)), np.float64)
    exponential = np.exp(logits - logits.max(-1, keepdims=True))
    probability: NDArray[np.float64] = exponential / exponential.sum(-1, keepdims=True)
    return probability


class OutputReading(Options):
    """Options of every metric that reads the model's output."""

    scored_class: ScoredClass = "label"
    """Whose output is read."""
    output: Output = "logit"
    """What is read."""

    @property
    def output_bounds(self) -> tuple[float, float]:
        """Lowest and highest output there can be."""
        return (0.0, 1.0) if self.output == "probability" else (-inf, inf)


def outputs(
    view: ImageView, logits_SK: NDArray[np.floating], reading: OutputReading
) -> tuple[float, NDArray[np.float64]]:
    """The scored class's output for the image itself, and for the S copies (S,)."""
    k = view.scored_class(reading.scored_class)
    itself = model_output(view.logits_K, reading.output)[k]
    return float(itself), model_output(logits_SK, reading.output)[:, k]

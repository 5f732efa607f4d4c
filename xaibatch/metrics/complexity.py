"""A map in, one number out: how concentrated it is. No model, no perturbation.

Shape letters: H W pixels, N = H*W.
"""

from typing import Any, Literal

import numpy as np

from xaibatch.errors import NotScoredError
from xaibatch.metrics.base import METRICS, MapMetric, MapView
from xaibatch.metrics.reading import MapReading, read_map
from xaibatch.types import NEGATIVE_MAP


class ComplexityOptions(MapReading):
    abs: bool = True


@METRICS.register("sparseness")
class Sparseness(MapMetric):
    """Gini index of |map| (Chalasani et al. 2020): 0 all pixels alike, towards 1 one pixel holds everything.

    As Quantus 0.6 1e-7 is added to every value first. Quantus adds it to the caller's array; here nothing is changed.
    Without `abs` a map with negative values is not scored: its index has no limits, and no sign where they prevail.
    """

    name = "sparseness"
    title = "Sparseness"
    family = "complexity"
    paper = "Chalasani et al. 2020, Concise explanations of neural networks using adversarial training"
    higher_is_better = True
    bounds = (0.0, 1.0)
    Options = ComplexityOptions
    options: ComplexityOptions

    OFFSET = 1e-7
    """Added to every value, as the reference does, so that equal tiny values still have a defined share."""

    def score(self, view: MapView) -> float:
        sorted_N = np.sort(read_map(view.pixels_HW, self.options), axis=None) + self.OFFSET
        if sorted_N[0] < 0:
            raise NotScoredError(NEGATIVE_MAP, "the Gini index of a map with negative values is undefined: set abs")
        n = sorted_N.size
        return float((2 * np.arange(1, n + 1) - n - 1) @ sorted_N / (n * sorted_N.sum()))


@METRICS.register("complexity")
class Complexity(MapMetric):
    """Entropy (nats) of the shares |a_i| / sum|a| (Bhatt et al. 2020): 0 to ln(N), lower is simpler."""

    name = "complexity"
    title = "Complexity (entropy)"
    family = "complexity"
    paper = "Bhatt et al. 2020, Evaluating and aggregating feature-based model explanations"
    higher_is_better = False
    bounds = (0.0, float("inf"))
    Options = ComplexityOptions
    options: ComplexityOptions

    OFFSET = 1e-12
    """Added inside the logarithm, as the reference does: a pixel without relevance then counts for nothing."""

    def score(self, view: MapView) -> float:
        values = read_map(view.pixels_HW, self.options)
        share = values / np.abs(values).sum()
        if (share < 0).any():
            raise NotScoredError(NEGATIVE_MAP, "the entropy of a map with negative values is undefined: set abs")
        return float(-(share * np.log(share + self.OFFSET)).sum())


class EffectiveComplexityOptions(ComplexityOptions):
    eps: float = 1e-5
    """Values above this count as relevant (unit: the map's, after normalisation)."""
    unit: Literal["pixels", "share"] = "pixels"
    """`pixels`: how many (Quantus 0.6); `share`: divided by the number of pixels (the study)."""


@METRICS.register("effective_complexity")
class EffectiveComplexity(MapMetric):
    """How many pixels have |map| above eps (after Nguyen and Martinez 2020, with eps as tolerance).

    Their definition searches the smallest set of features that keeps the output; like Quantus this only counts.
    """

    name = "effective_complexity"
    title = "Effective Complexity"
    family = "complexity"
    paper = "Nguyen and Martinez 2020, On quantitative aspects of model interpretability"
    higher_is_better = False
    bounds = (0.0, float("inf"))
    Options = EffectiveComplexityOptions
    options: EffectiveComplexityOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.unit == "share":
            self.bounds = (0.0, 1.0)

    def score(self, view: MapView) -> float:
        relevant = read_map(view.pixels_HW, self.options) > self.options.eps
        return float(relevant.mean() if self.options.unit == "share" else relevant.sum())

"""The most relevant entries removed first, step by step: Pixel-Flipping, Sensitivity-N's curve, insertion and deletion.

Shape letters: C channels, H W pixels, N entries, S steps.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.maps import TokenGrid
from xaibatch.metrics.base import METRICS, ImageView, MapView, PlanMetric
from xaibatch.metrics.curves import (
    Area,
    Steps,
    counts_of,
    num_steps,
    order_key,
    order_of,
    relevance_by_entry,
    trapezoid,
)
from xaibatch.metrics.reading import MapReading, Output, OutputReading, ScoredClass, outputs, read_map
from xaibatch.perturb.plans import Baseline, OrderPlan, PerturbationPlan


def removal_plan(view: ImageView, options: Steps) -> OrderPlan:
    """Remove the most relevant entries first, step by step until nothing is left."""
    assert isinstance(view, MapView)
    relevance_N = relevance_by_entry(read_map(view.pixels_HW, options), view.shape_CHW, options.entries)
    return OrderPlan(
        order_N=order_of(relevance_N, "descending"),
        counts_S=counts_of(options, view),
        entries=options.entries,
        baseline=options.baseline,
    )


class PixelFlippingOptions(Steps, Area):
    output: Output = "probability"


@METRICS.register("pixel_flipping")
class PixelFlipping(PlanMetric):
    """Area under the output while the most relevant entries are removed step by step; a good map makes it drop early.

    Bach et al. 2015. As in Quantus the curve starts after the first step. The score is the
    curve's mean height, in [0, 1] for probabilities (`auc="steps"`: Quantus's `return_auc_per_sample`).
    """

    name = "pixel_flipping"
    title = "Pixel-Flipping (area under the curve)"
    family = "faithfulness"
    paper = "Bach et al. 2015, On pixel-wise explanations for non-linear classifier decisions by LRP"
    higher_is_better = False
    bounds = (0.0, 1.0)
    Options = PixelFlippingOptions
    options: PixelFlippingOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.bounds = self.options.area_bounds(*self.options.output_bounds)

    def plan(self, view: ImageView) -> PerturbationPlan:
        return removal_plan(view, self.options)

    def curve(self, view: MapView, logits_SK: NDArray[np.float64]) -> NDArray[np.float64]:
        """The scored class's output after each step (S,)."""
        return outputs(view, logits_SK, self.options)[1]

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        return self.options.area(self.curve(view, logits_SK))

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        return num_steps(self.options, shape_CHW, grid)

    def cell_key(self) -> str:
        return order_key(self.options, "delete")


class RiseOptions(MapReading, OutputReading):
    scored_class: ScoredClass = "predicted"
    output: Output = "probability"
    pixels_in_step: int | None = Field(None, ge=1)
    """Pixels changed in one step; None: as many as the image is wide, as the paper's code does."""
    baseline: Baseline = 0.0
    """What stands where the image is not shown. Default as in the paper's code: zero in normalised units."""


class RiseCurve(PlanMetric):
    """Area under the output while pixels are removed from, or put into, the image by falling relevance.

    In [0, 1] for probabilities. Petsiuk et al. 2018: both ends belong to the curve, the trapezoid rule, divided by the
    number of steps. The end that is the image itself costs no forward pass.
    """

    family = "faithfulness"
    paper = "Petsiuk et al. 2018, RISE: Randomized input sampling for explanation of black-box models"
    bounds = (0.0, 1.0)
    Options = RiseOptions
    options: RiseOptions
    direction: Literal["delete", "insert"]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.bounds = self.options.output_bounds

    def plan(self, view: ImageView) -> PerturbationPlan:
        assert isinstance(view, MapView)
        num_pixels = view.shape_CHW[1] * view.shape_CHW[2]
        step = self._step(view.shape_CHW)
        inner_S = np.arange(step, num_pixels, step)
        counts_S = [*inner_S, num_pixels] if self.direction == "delete" else [0, *inner_S]
        return OrderPlan(
            order_N=order_of(read_map(view.pixels_HW, self.options).ravel(), "descending"),
            counts_S=np.array(counts_S, np.int32),
            entries="pixel",
            baseline=self.options.baseline,
            direction=self.direction,
        )

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        itself, copies_S = outputs(view, logits_SK, self.options)
        curve = np.array([itself, *copies_S] if self.direction == "delete" else [*copies_S, itself])
        return trapezoid(curve) / (len(curve) - 1)

    def _step(self, shape_CHW: tuple[int, int, int]) -> int:
        return self.options.pixels_in_step or shape_CHW[2]

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        return -(-shape_CHW[1] * shape_CHW[2] // self._step(shape_CHW))


@METRICS.register("deletion_auc")
class DeletionAuc(RiseCurve):
    """Pixels removed by falling relevance: a good map makes the probability drop early."""

    name = "deletion_auc"
    title = "Deletion AUC (RISE)"
    higher_is_better = False
    direction = "delete"


class InsertionOptions(RiseOptions):
    baseline: Baseline = "blur"
    """What the pixels are put into. Default: the blurred image (the paper's kernel is narrower: sigma 5 pixels)."""


@METRICS.register("insertion_auc")
class InsertionAuc(RiseCurve):
    """Pixels put into the blurred image by falling relevance: a good map makes the probability rise early."""

    name = "insertion_auc"
    title = "Insertion AUC (RISE)"
    higher_is_better = True
    direction = "insert"
    Options = InsertionOptions

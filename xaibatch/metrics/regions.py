"""Whole regions of the image removed one after another: Region Perturbation, Selectivity, IROF.

Shape letters: C channels, H W pixels, M regions, S steps.
"""

from math import inf
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.errors import NotScoredError
from xaibatch.maps import TokenGrid
from xaibatch.metrics.base import METRICS, ImageView, MapView, PlanMetric
from xaibatch.metrics.curves import Area, order_of, trapezoid
from xaibatch.metrics.patches import Patches, num_patches, patches_of, sums_by_segment
from xaibatch.metrics.reading import MapReading, Output, OutputReading, outputs, read_map
from xaibatch.perturb.plans import Baseline, PerturbationPlan, SuperpixelPlan
from xaibatch.types import ZERO_DENOMINATOR


def removal_of_regions(
    segments_HW: NDArray[np.int32], order_M: NDArray[np.int32], num_steps: int, baseline: Baseline
) -> SuperpixelPlan:
    """Copy s lacks the first s + 1 regions of the order; one that the order does not name always stays."""
    rank_M = np.full(segments_HW.max() + 1, len(order_M), np.int32)
    rank_M[order_M] = np.arange(len(order_M), dtype=np.int32)
    keep_SM = rank_M > np.arange(min(num_steps, len(order_M)))[:, None]
    return SuperpixelPlan(segments_HW=segments_HW, keep_SM=keep_SM, baseline=baseline)


class PatchOptions(MapReading, OutputReading, Area):
    output: Output = "probability"
    patch_size: int | None = Field(None, ge=1)
    """Side of the square regions in pixels, on a centred grid as Quantus lays it (Quantus: 8). None: the model's own
    tokens; what they leave of the image, which the model does not see, is never removed."""
    baseline: Baseline = "black"
    """What a removed region becomes, from the unchanged image."""

    def relevance(self, view: MapView, patches: Patches) -> NDArray[np.float64]:
        """Sum of the map over each region (M,)."""
        return sums_by_segment(read_map(view.pixels_HW, self), patches.segments_HW)[: patches.num]


class RegionPerturbationOptions(PatchOptions):
    order: Literal["morf", "lerf", "random"] = "morf"
    """Most relevant region first, least relevant first, or in an order drawn from the image's key."""
    regions_evaluation: int = Field(100, ge=1)
    """Regions removed at most."""


@METRICS.register("region_perturbation")
class RegionPerturbation(PlanMetric):
    """Area under the drop of the output while the most relevant square regions are removed; a good map makes it large.

    Samek et al. 2017 (AOPC). As in Quantus the curve starts after the first region. The score is the
    curve's mean height (`auc="steps"`: the area that Quantus's `get_auc_score` averages). Quantus declares that lower
    is better, though it measures the drop: higher is better under `morf`, lower under `lerf`, neither under `random`,
    where the map plays no part.
    """

    name = "region_perturbation"
    title = "Region Perturbation (area over the curve)"
    family = "faithfulness"
    paper = "Samek et al. 2017, Evaluating the visualization of what a deep neural network has learned"
    higher_is_better: bool | None = True
    bounds = (-1.0, 1.0)
    Options = RegionPerturbationOptions
    options: RegionPerturbationOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.higher_is_better = {"morf": True, "lerf": False, "random": None}[self.options.order]
        lowest, highest = self.options.output_bounds
        self.bounds = self.options.area_bounds(lowest - highest, highest - lowest)

    def plan(self, view: ImageView) -> PerturbationPlan:
        assert isinstance(view, MapView)
        patches = patches_of(view, self.options.patch_size)
        relevance_M = self.options.relevance(view, patches)
        if self.options.order == "random":
            order_M = view.key.generator("region_perturbation").permutation(len(relevance_M)).astype(np.int32)
        else:
            order_M = order_of(relevance_M, "descending" if self.options.order == "morf" else "ascending")
        return removal_of_regions(patches.segments_HW, order_M, self.options.regions_evaluation, self.options.baseline)

    def curve(self, view: MapView, logits_SK: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far the scored class's output has dropped after each region (S,)."""
        itself, copies_S = outputs(view, logits_SK, self.options)
        return itself - copies_S

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        return self.options.area(self.curve(view, logits_SK))

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        return min(num_patches(shape_CHW, grid, self.options.patch_size), self.options.regions_evaluation)


@METRICS.register("selectivity")
class Selectivity(PlanMetric):
    """Area under the output while square regions are removed by falling relevance; a good map makes it drop early.

    Montavon et al. 2018. As in Quantus the curve starts after the first region; mean height by default.
    """

    name = "selectivity"
    title = "Selectivity (area under the curve)"
    family = "faithfulness"
    paper = "Montavon et al. 2018, Methods for interpreting and understanding deep neural networks"
    higher_is_better = False
    bounds = (0.0, 1.0)
    Options = PatchOptions
    options: PatchOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.bounds = self.options.area_bounds(*self.options.output_bounds)

    def plan(self, view: ImageView) -> PerturbationPlan:
        assert isinstance(view, MapView)
        patches = patches_of(view, self.options.patch_size)
        relevance_M = self.options.relevance(view, patches)
        order_M = order_of(relevance_M, "descending")
        return removal_of_regions(patches.segments_HW, order_M, len(order_M), self.options.baseline)

    def curve(self, view: MapView, logits_SK: NDArray[np.float64]) -> NDArray[np.float64]:
        """The scored class's output after each region (S,)."""
        return outputs(view, logits_SK, self.options)[1]

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        return self.options.area(self.curve(view, logits_SK))

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        return num_patches(shape_CHW, grid, self.options.patch_size)


class IrofOptions(MapReading, OutputReading):
    output: Output = "probability"
    num_segments: int = Field(100, ge=2)
    """Superpixels asked of SLIC (scikit-image's default, as Quantus); there may be a few more or fewer."""
    baseline: Baseline = "mean"
    """What a removed superpixel becomes. Quantus takes `mean` over all images and channels of the batch, as changed so
    far; here it is the mean of the unchanged image."""
    auc: Literal["steps", "unit"] = "steps"
    """`steps`: area over the curve with one unit a superpixel (Quantus's number); `unit`: divided by their number."""


@METRICS.register("irof")
class Irof(PlanMetric):
    """Area over the relative output while superpixels are removed by falling mean relevance; a good map makes it large.

    Rieger and Hansen 2020: number of superpixels minus the area (trapezoid rule) under output / the image's
    own output. That has to be positive: relative to a negative logit the curve would rise while the output falls.
    Quantus scores it, and pads the batch to its largest number of superpixels, which adds half the last output to the
    area of every other image; here each image stands alone.
    """

    name = "irof"
    title = "IROF (area over the curve)"
    family = "faithfulness"
    paper = "Rieger and Hansen 2020, IROF: a low resource evaluation metric for explanation methods"
    higher_is_better = True
    bounds = (-inf, inf)
    needs = frozenset({"image"})
    Options = IrofOptions
    options: IrofOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.auc == "unit" and self.options.output == "probability":
            self.bounds = (-inf, 1.0)

    def plan(self, view: ImageView) -> PerturbationPlan:
        assert isinstance(view, MapView)
        segments_HW = self._segments(view)
        size_M = np.bincount(segments_HW.ravel())
        if len(size_M) < 2:
            raise NotScoredError(ZERO_DENOMINATOR, "the image is one single superpixel")
        mean_M = sums_by_segment(read_map(view.pixels_HW, self.options), segments_HW) / size_M
        order_M = order_of(mean_M, "descending")
        return removal_of_regions(segments_HW, order_M, len(order_M), self.options.baseline)

    def _segments(self, view: ImageView) -> NDArray[np.int32]:
        from skimage.segmentation import slic  # takes SciPy along: only where it is used

        image_HWC = np.moveaxis(view.image(), 0, -1).astype(np.float32)  # the same superpixels in a run in float64
        labels_HW = slic(image_HWC.astype(np.float64), n_segments=self.options.num_segments, start_label=0)
        return np.unique(labels_HW, return_inverse=True)[1].reshape(labels_HW.shape).astype(np.int32)

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        itself, copies_S = outputs(view, logits_SK, self.options)
        if itself <= 0:
            raise NotScoredError(ZERO_DENOMINATOR, f"the output for the image itself is not positive: {itself:g}")
        num_segments = len(copies_S)
        over = num_segments - trapezoid(copies_S / itself)
        return over if self.options.auc == "steps" else over / num_segments

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        return self.options.num_segments

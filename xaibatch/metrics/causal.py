"""An image and its lesion-free twin: does the map point at what differs, and does it follow when the lesion goes?

Both are the same film but for the lesion, so the region where they differ is the cause of any change of the output
(under `value_range: min_max` the twin is stretched by its image's range, else nearly all pixels would differ). The
explainer's own positive relevance counts, before the run's normalisation: min-max scaling would make every map's least
value zero, and evidence against the class would become evidence for it.

Shape letters: H W pixels.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.errors import NotScoredError
from xaibatch.metrics.base import METRICS, ImageView, MapMetric, MapView, TwinVariant, VariantMetric, VariantView
from xaibatch.metrics.reading import positive_mass
from xaibatch.options import Options
from xaibatch.types import ALL_ZERO_MAP, ZERO_DENOMINATOR


class ChangedRegion(Options):
    threshold: float = Field(0.05, ge=0, lt=1)
    """A pixel belongs to the changed region if image and twin differ there by more than this share of their largest
    difference (mean over channels of the absolute difference)."""

    def region(self, view: ImageView) -> NDArray[np.bool_]:
        """Where image and twin really differ (H,W); NotScoredError without a twin, or where nothing differs."""
        changed_HW = view.changed_HW()
        if not changed_HW.any():
            raise NotScoredError(ZERO_DENOMINATOR, "the image and its lesion-free twin are the same")
        region_HW: NDArray[np.bool_] = changed_HW > self.threshold * changed_HW.max()
        return region_HW


@METRICS.register("counterfactual_mass")
class CounterfactualMass(MapMetric):
    """Share of the map's positive relevance that lies where image and lesion-free twin differ, 0 to 1.

    With m the positive part of the map and R the changed region: sum of m in R / sum of m. A map without preference
    gets the region's share of the image; the random explainer shows that floor. Unlike a localisation score against a
    drawn mask, R is the exact cause of what the twin changes in the model's output.
    """

    name = "counterfactual_mass"
    title = "Counterfactual mass"
    family = "causal"
    paper = "this package; the mass accuracy of Arras et al. 2022 with the true difference to a twin as ground truth"
    higher_is_better = True
    bounds = (0.0, 1.0)
    needs = frozenset({"image", "twin"})
    Options = ChangedRegion
    options: ChangedRegion

    def score(self, view: MapView) -> float:
        region_HW = self.options.region(view)
        return _mass_in(positive_mass(view), region_HW)


class CounterfactualResponseOptions(ChangedRegion):
    mass: Literal["share", "raw"] = "share"
    """`share`: each map's relevance in the region is taken as a share of that map's own positive total, so that scale
    does not matter; `raw`: as the explainer gives it, which makes sense where a map's total means something (relevance
    that sums to the logit)."""


@METRICS.register("counterfactual_response")
class CounterfactualResponse(VariantMetric):
    """Does the map leave the changed region when the lesion is removed? 1: entirely, 0: it stays, -1: it comes only
    then.

    With r and r' the positive relevance in the changed region, in the map of the image and in that of its twin (for
    the same class): (r - r') / max(r, r'). While relevance falls this is the share of the region's relevance that
    vanishes, while it rises minus the share that is new. A twin's map without any positive relevance has r' = 0:
    evidence that has gone. 0 is also what a map that ignores the image gets, and on average a random one.
    """

    name = "counterfactual_response"
    title = "Counterfactual response"
    family = "causal"
    paper = "this package"
    higher_is_better = True
    bounds = (-1.0, 1.0)
    needs = frozenset({"image", "twin"})
    Options = CounterfactualResponseOptions
    options: CounterfactualResponseOptions

    def variants(self, view: ImageView) -> tuple[TwinVariant, ...]:
        if view.image_CHW is not None:
            self.options.region(view)
        return (TwinVariant(),)

    def num_variants(self) -> int:
        return 1

    def score(self, view: MapView, answers: tuple[VariantView, ...]) -> float:
        region_HW = self.options.region(view)
        with_lesion = self._relevance(positive_mass(view), region_HW)
        without = self._relevance(_twin_mass(view, answers[0]), region_HW)
        larger = max(with_lesion, without)
        if larger == 0:
            raise NotScoredError(ZERO_DENOMINATOR, "neither map has positive relevance where image and twin differ")
        return (with_lesion - without) / larger

    def _relevance(self, mass_HW: NDArray[np.float64], region_HW: NDArray[np.bool_]) -> float:
        if self.options.mass == "raw" or not mass_HW.any():
            return float(mass_HW[region_HW].sum())
        return _mass_in(mass_HW, region_HW)

    def cell_key(self) -> str:
        return "twin"


def _twin_mass(view: MapView, answer: VariantView) -> NDArray[np.float64]:
    """Positive relevance of the twin's map (H,W); none at all is an answer, not a fault."""
    try:
        return positive_mass(view, answer.map_hw)
    except NotScoredError as error:
        if error.status != ALL_ZERO_MAP:
            raise NotScoredError(error.status, f"the twin's map: {error.reason}") from None
        return np.zeros(view.shape_CHW[1:])


def _mass_in(mass_HW: NDArray[np.float64], region_HW: NDArray[np.bool_]) -> float:
    total = float(mass_HW.sum())
    if total == 0:
        raise NotScoredError(ZERO_DENOMINATOR, "the map has no positive relevance")
    return float(mass_HW[region_HW].sum()) / total

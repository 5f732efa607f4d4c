"""The most relevant pixels imputed from their neighbours, is the class still predicted: ROAD.

Shape letters: C channels, H W pixels, S shares.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.maps import TokenGrid
from xaibatch.metrics.base import METRICS, ImageView, MapView, PlanMetric
from xaibatch.metrics.curves import order_of
from xaibatch.metrics.reading import MapReading, ScoredClass, read_map
from xaibatch.perturb.plans import ImputationPlan, PerturbationPlan


class RoadOptions(MapReading):
    scored_class: ScoredClass = "label"
    """Which class has to stay the predicted one."""
    percentages: tuple[Annotated[float, Field(gt=0, lt=100)], ...] = Field(tuple(range(1, 100, 2)), min_length=1)
    """Shares of the pixels removed, in percent; each one forward pass. Something has to stay to impute from."""
    noise: float = Field(0.01, ge=0)
    """Standard deviation of the noise added to imputed pixels, in units of the normalised image."""


@METRICS.register("road")
class Road(PlanMetric):
    """Share of the percentages at which the class is still predicted after the most relevant pixels were imputed, 0
    to 1.

    Rong et al. 2022 (ROAD, most relevant first): noisy linear imputation hides less of the mask's shape than
    one colour does. Quantus returns the mean over the images of one batch for every percentage; the mean over images of
    this score is the mean over percentages of Quantus's. Quantus 0.6 fails on images with more than one channel.
    """

    name = "road"
    title = "ROAD (most relevant first)"
    family = "faithfulness"
    paper = "Rong et al. 2022, A consistent and efficient evaluation strategy for attribution methods"
    higher_is_better = False
    bounds = (0.0, 1.0)
    Options = RoadOptions
    options: RoadOptions

    def plan(self, view: ImageView) -> PerturbationPlan:
        assert isinstance(view, MapView)
        order_N = order_of(read_map(view.pixels_HW, self.options).ravel(), "descending")
        counts_S = np.array([int(len(order_N) * share / 100) for share in self.options.percentages], np.int32)
        return ImputationPlan(order_N=order_N, counts_S=counts_S, noise_std=self.options.noise, key=view.key)

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        return float((np.argmax(logits_SK, -1) == view.scored_class(self.options.scored_class)).mean())

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        return len(self.options.percentages)

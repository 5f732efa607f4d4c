"""Square regions removed, the output's drop against what the map predicts for it: Infidelity.

Shape letters: C channels, H W pixels, M patches, S copies.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.maps import TokenGrid
from xaibatch.metrics.base import METRICS, ImageView, MapView, PlanMetric
from xaibatch.metrics.patches import num_patches, patches_of, sums_by_segment
from xaibatch.metrics.reading import MapReading, OutputReading, outputs, read_map
from xaibatch.perturb.plans import PerturbationPlan, SuperpixelPlan


class InfidelityOptions(MapReading, OutputReading):
    normalise: bool = False
    semantics: Literal["quantus-0.6", "yeh-2019"] = "quantus-0.6"
    """`quantus-0.6`: squares are removed one after another, row by row, until nothing is left; `yeh-2019`: each
    square is removed alone."""
    patch_size: int | None = Field(None, ge=1)
    """Side of the squares in pixels, on a centred grid (Quantus: 4, which is 3,136 forward passes at 224 pixels). None:
    the model's own tokens; what they leave of the image, which the model does not see, is never removed."""
    baseline: float | Literal["black", "white", "mean"] = "black"
    """What a removed square becomes, from the unchanged image."""


@METRICS.register("infidelity")
class Infidelity(PlanMetric):
    """Mean squared difference of (sum of map x change of the image) and (drop of the output); 0 is best.

    Yeh et al. 2019 (square removal). The map counts per channel entry. The squares do
    not look at the map, so one plan serves every explainer. Quantus repeats its removals `n_perturb_samples` times,
    though nothing in them is random; once is enough. Scores depend on the scale of the map: compare explainers of one
    scale only.
    """

    name = "infidelity"
    title = "Infidelity"
    family = "faithfulness"
    paper = "Yeh et al. 2019, On the (in)fidelity and sensitivity of explanations"
    higher_is_better = False
    bounds = (0.0, float("inf"))
    plan_uses_map = False
    needs = frozenset({"image"})
    Options = InfidelityOptions
    options: InfidelityOptions

    def plan(self, view: ImageView) -> PerturbationPlan:
        patches = patches_of(view, self.options.patch_size)
        removed_SM = np.eye(patches.num, patches.num_segments, dtype=bool)
        if self.options.semantics == "quantus-0.6":
            removed_SM = np.tri(patches.num, patches.num_segments, dtype=bool)
        return SuperpixelPlan(segments_HW=patches.segments_HW, keep_SM=~removed_SM, baseline=self.options.baseline)

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        assert isinstance(plan, SuperpixelPlan)
        itself, copies_S = outputs(view, logits_SK, self.options)
        image_CHW = np.asarray(view.image(), np.float64)
        change_HW = (image_CHW - _baseline_value(image_CHW, self.options.baseline)).sum(0)
        predicted_M = sums_by_segment(read_map(view.pixels_HW, self.options) * change_HW, plan.segments_HW)
        predicted_S = (~plan.keep_SM).astype(np.float64) @ predicted_M
        return float(((itself - copies_S - predicted_S) ** 2).mean())

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        return num_patches(shape_CHW, grid, self.options.patch_size)

    def cell_key(self) -> str:
        return f"squares:{self.options.semantics}:{self.options.patch_size}:{self.options.baseline}"


def _baseline_value(image_CHW: NDArray[np.float64], baseline: float | str) -> float:
    """The number that a removed entry becomes (see plans.Baseline)."""
    named = {"black": image_CHW.min(), "white": image_CHW.max(), "mean": image_CHW.mean()}
    return float(named[baseline] if isinstance(baseline, str) else baseline)

"""Relevance of removed features against the drop of the output, for sets of growing size: Sensitivity-N.

Shape letters: C channels, H W pixels, M patches, S copies.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.errors import NotScoredError
from xaibatch.maps import TokenGrid
from xaibatch.metrics.base import METRICS, ImageView, MapView, PlanMetric
from xaibatch.metrics.curves import Steps, counts_of, num_steps, order_key, relevance_by_entry, sums_by_step
from xaibatch.metrics.deletion import removal_plan
from xaibatch.metrics.faithfulness_correlation import hidden_relevance
from xaibatch.metrics.patches import num_patches, patches_of
from xaibatch.metrics.reading import Output, outputs, read_map
from xaibatch.metrics.similarity import Correlation, correlation
from xaibatch.perturb.plans import OrderPlan, PerturbationPlan, SuperpixelPlan
from xaibatch.types import ZERO_DENOMINATOR


class SensitivityNOptions(Steps):
    semantics: Literal["ancona-2018", "quantus-0.6"] = "ancona-2018"
    """`ancona-2018`: random sets of n tokens, correlated over the sets of one size, averaged over sizes; the sets do
    not look at the map. `quantus-0.6`: the cumulative removal by falling relevance of Quantus, correlated over the
    steps."""
    output: Output = "probability"
    similarity: Correlation = "pearson"
    n_max_percentage: float = Field(0.8, gt=0, le=1)
    """Largest set, as a share of all features (`quantus-0.6`: of the pixels, whatever `entries` says)."""
    num_sizes: int = Field(8, ge=1)
    """Set sizes from one token up, evenly spaced on a logarithmic scale (`ancona-2018`)."""
    num_runs: int = Field(40, ge=3)
    """Random sets of each size, each one forward pass (`ancona-2018`)."""


@METRICS.register("sensitivity_n")
class SensitivityN(PlanMetric):
    """Correlation of (relevance removed) with (drop of the output), in [-1, 1].

    Ancona et al. 2018: for each n the Pearson correlation over random sets of n
    features, per image; the score is the mean over n. Features are the model's tokens. A size at which one side is
    constant has no correlation and is left out of the mean.

    Quantus 0.6 removes by falling relevance and correlates across the images of its first batch instead, so its
    numbers belong to a step, not to an image; `semantics="quantus-0.6"` has the same removals and sums, correlated
    over the steps of one image. There the sums are of single steps and fall, while the drop adds up and rises: a
    perfect map gets a negative correlation, so that this form has no direction.
    """

    name = "sensitivity_n"
    title = "Sensitivity-N"
    family = "faithfulness"
    paper = "Ancona et al. 2018, Towards better understanding of gradient-based attribution methods"
    higher_is_better: bool | None = True
    bounds = (-1.0, 1.0)
    plan_uses_map = False
    Options = SensitivityNOptions
    options: SensitivityNOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.semantics == "quantus-0.6":
            self.plan_uses_map, self.higher_is_better = True, None

    def plan(self, view: ImageView) -> PerturbationPlan:
        if self.options.semantics == "quantus-0.6":
            return removal_plan(view, self.options)
        patches = patches_of(view)
        generator = view.key.generator("sensitivity_n")
        sizes_S = np.repeat(self._sizes(patches.num), self.options.num_runs)
        keep_SM = np.ones((len(sizes_S), patches.num_segments), bool)
        for keep_M, size in zip(keep_SM, sizes_S, strict=True):
            keep_M[generator.choice(patches.num, size, replace=False)] = False
        return SuperpixelPlan(segments_HW=patches.segments_HW, keep_SM=keep_SM, baseline=self.options.baseline)

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        itself, copies_S = outputs(view, logits_SK, self.options)
        values_HW = read_map(view.pixels_HW, self.options)
        if isinstance(plan, OrderPlan):
            ordered_N = relevance_by_entry(values_HW, view.shape_CHW, self.options.entries)[plan.order_N]
            relevance_S = sums_by_step(ordered_N, plan.counts_S)
            last = self._last_step(view)
            return correlation((itself - copies_S)[:last], relevance_S[:last], self.options.similarity)
        relevance_S = hidden_relevance(values_HW, plan)
        correlations = []
        for first in range(0, len(copies_S), self.options.num_runs):
            of_size = slice(first, first + self.options.num_runs)
            try:
                correlations.append(
                    correlation(relevance_S[of_size], (itself - copies_S)[of_size], self.options.similarity)
                )
            except NotScoredError:
                continue
        if not correlations:
            raise NotScoredError(ZERO_DENOMINATOR, "relevance or output is constant over the sets of every size")
        return float(np.mean(correlations))

    def _sizes(self, num_tokens: int) -> NDArray[np.int64]:
        largest = max(1.0, self.options.n_max_percentage * num_tokens)
        return np.unique(np.geomspace(1, largest, self.options.num_sizes).round().astype(np.int64))

    def _last_step(self, view: ImageView) -> int:
        """Steps that count: Quantus cuts at a share of the pixels, in units of steps."""
        num_pixels = view.shape_CHW[1] * view.shape_CHW[2]
        step = self.options.entries_in_step(view.shape_CHW, view.patch_size)
        return min(int(self.options.n_max_percentage * num_pixels // step), len(counts_of(self.options, view)))

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        if self.options.semantics == "quantus-0.6":
            return num_steps(self.options, shape_CHW, grid)
        return len(self._sizes(num_patches(shape_CHW, grid))) * self.options.num_runs

    def cell_key(self) -> str:
        options = self.options
        if options.semantics == "quantus-0.6":
            return order_key(options, "delete")
        return f"sets:{options.num_sizes}:{options.num_runs}:{options.n_max_percentage}:{options.baseline}"

"""One group of entries changed at a time, in the order of relevance: Faithfulness Estimate and both Monotonicities.

Shape letters: C channels, H W pixels, N entries, S steps or copies, G groups, K entries of a group.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.maps import TokenGrid
from xaibatch.metrics.base import METRICS, ImageView, MapView, PlanMetric
from xaibatch.metrics.curves import Steps, counts_of, num_steps, order_key, order_of, relevance_by_entry
from xaibatch.metrics.reading import Output, outputs, read_map
from xaibatch.metrics.similarity import Correlation, correlation
from xaibatch.perturb.plans import FillPlan, OrderPlan, PerturbationPlan, SubsetPlan


def grouped(order_N: NDArray[np.int32], counts_S: NDArray[np.int32]) -> NDArray[np.int32]:
    """The entries of each step (S,K). A shorter last step repeats its last entry: changing it twice changes nothing."""
    width = int(counts_S[0])
    padded = np.concatenate([order_N, np.repeat(order_N[-1:], len(counts_S) * width - len(order_N))])
    return padded.reshape(len(counts_S), width)


def sums_by_group(relevance_N: NDArray[np.float64], index_GK: NDArray[np.int32]) -> NDArray[np.float64]:
    """Relevance of each group's entries, every entry once, float64 (G,)."""
    sums_G: NDArray[np.float64] = relevance_N[index_GK].sum(1)
    num_repeats = index_GK.size - len(relevance_N)
    sums_G[-1] -= num_repeats * relevance_N[index_GK[-1, -1]]
    return sums_G


class FaithfulnessEstimateOptions(Steps):
    similarity: Correlation = "pearson"


@METRICS.register("faithfulness_estimate")
class FaithfulnessEstimate(PlanMetric):
    """Correlation over groups of entries of (relevance in the group) with (drop of the output without it), in [-1, 1].

    Alvarez-Melis and Jaakkola 2018 (there for single interpretable features). Each group is removed alone.
    """

    name = "faithfulness_estimate"
    title = "Faithfulness Estimate"
    family = "faithfulness"
    paper = "Alvarez-Melis and Jaakkola 2018, Towards robust interpretability with self-explaining neural networks"
    higher_is_better = True
    bounds = (-1.0, 1.0)
    Options = FaithfulnessEstimateOptions
    options: FaithfulnessEstimateOptions

    def plan(self, view: ImageView) -> PerturbationPlan:
        assert isinstance(view, MapView)
        order_N = order_of(_relevance(view, self.options), "descending")
        return SubsetPlan(
            index_SK=grouped(order_N, counts_of(self.options, view)),
            entries=self.options.entries,
            baseline=self.options.baseline,
        )

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        assert isinstance(plan, SubsetPlan)
        itself, copies_S = outputs(view, logits_SK, self.options)
        relevance_S = sums_by_group(_relevance(view, self.options), plan.index_SK)
        return correlation(relevance_S, itself - copies_S, self.options.similarity)

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        return num_steps(self.options, shape_CHW, grid)


class MonotonicityOptions(Steps):
    abs: bool = True
    output: Output = "probability"
    similarity: Correlation = "spearman"
    num_samples: int = Field(10, ge=1)
    """Values tried for each group, each one forward pass (Quantus: 100)."""
    fill_low: float = 0.0
    fill_high: float = 1.0
    """A group is filled with one number drawn uniformly from [fill_low, fill_high), in units of the normalised image.
    `baseline` plays no part."""
    eps: float = Field(1e-5, ge=0)
    """An output below this in magnitude is not used to scale the variance."""


@METRICS.register("monotonicity")
class Monotonicity(PlanMetric):
    """Rank correlation over groups of (relevance) with (variance of the output when the group is filled), in [-1, 1].

    Nguyen and Martinez 2020; Quantus's `MonotonicityCorrelation`. The variance is the mean squared
    difference to the image's own output, over its square.
    """

    name = "monotonicity"
    title = "Monotonicity (Nguyen)"
    family = "faithfulness"
    paper = "Nguyen and Martinez 2020, On quantitative aspects of model interpretability"
    higher_is_better = True
    bounds = (-1.0, 1.0)
    Options = MonotonicityOptions
    options: MonotonicityOptions

    def plan(self, view: ImageView) -> PerturbationPlan:
        assert isinstance(view, MapView)
        order_N = order_of(_relevance(view, self.options), "ascending")
        index_GK = grouped(order_N, counts_of(self.options, view))
        group_S = np.repeat(np.arange(len(index_GK), dtype=np.int32), self.options.num_samples)
        generator = view.key.generator("monotonicity")
        value_S = generator.uniform(self.options.fill_low, self.options.fill_high, len(group_S))
        return FillPlan(index_GK=index_GK, group_S=group_S, value_S=value_S, entries=self.options.entries)

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        assert isinstance(plan, FillPlan)
        itself, copies_S = outputs(view, logits_SK, self.options)
        num_groups = len(plan.index_GK)
        squared_G = np.bincount(plan.group_S, (copies_S - itself) ** 2, num_groups)
        variance_G = squared_G / np.bincount(plan.group_S, minlength=num_groups)
        if abs(itself) >= self.options.eps:
            variance_G = variance_G / itself**2
        relevance_G = sums_by_group(_relevance(view, self.options), plan.index_GK)
        return correlation(relevance_G, variance_G, self.options.similarity)

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        return self.options.num_samples * num_steps(self.options, shape_CHW, grid)


class MonotonicityAryaOptions(Steps):
    abs: bool = True
    output: Output = "probability"


@METRICS.register("monotonicity_arya")
class MonotonicityArya(PlanMetric):
    """1 if the output never falls while entries are put into the baseline by rising relevance, else 0.

    Arya et al. 2019. Quantus 0.6 (`Monotonicity`) writes the baseline over the baseline, so its
    copies never change and it says True for every map; here the image's entries are put in, as the paper says.
    """

    name = "monotonicity_arya"
    title = "Monotonicity (Arya)"
    family = "faithfulness"
    paper = "Arya et al. 2019, One explanation does not fit all: A toolkit and taxonomy of AI explainability techniques"
    higher_is_better = True
    bounds = (0.0, 1.0)
    Options = MonotonicityAryaOptions
    options: MonotonicityAryaOptions

    def plan(self, view: ImageView) -> PerturbationPlan:
        assert isinstance(view, MapView)
        return OrderPlan(
            order_N=order_of(_relevance(view, self.options), "ascending"),
            counts_S=counts_of(self.options, view),
            entries=self.options.entries,
            baseline=self.options.baseline,
            direction="insert",
        )

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        return float((np.diff(outputs(view, logits_SK, self.options)[1]) >= 0).all())

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        return num_steps(self.options, shape_CHW, grid)

    def cell_key(self) -> str:
        return order_key(self.options, "insert ascending")


def _relevance(view: MapView, options: Steps) -> NDArray[np.float64]:
    return relevance_by_entry(read_map(view.pixels_HW, options), view.shape_CHW, options.entries)

"""Random subsets of pixels hidden, the drop of the output against the relevance they held: Faithfulness Correlation.

Shape letters: C channels, H W pixels, S runs, K entries of a subset, M patches.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.maps import TokenGrid
from xaibatch.metrics.base import METRICS, ImageView, MapView, PlanMetric
from xaibatch.metrics.patches import patches_of, sums_by_segment
from xaibatch.metrics.reading import MapReading, OutputReading, outputs, read_map
from xaibatch.metrics.similarity import Correlation, correlation
from xaibatch.perturb.plans import Baseline, PerturbationPlan, SubsetPlan, SuperpixelPlan


class FaithfulnessCorrelationOptions(MapReading, OutputReading):
    semantics: Literal["quantus-0.6", "paper-2023"] = "quantus-0.6"
    """What is drawn where `entries` is not set: channel entries (Quantus 0.6) or whole pixels (the study)."""
    num_runs: int = Field(100, ge=2)
    """Random subsets, each one forward pass."""
    subset_size: int | None = Field(None, ge=1)
    """Entries hidden at once; None: 224, or a quarter of the patches where `entries` is `patch`."""
    entries: Literal["pixel", "channel", "patch"] | None = None
    """What is drawn: `channel` entries of C*H*W, whole `pixel`s of H*W, or `patch` tokens. None: by `semantics`."""
    baseline: Baseline = "black"
    """What a hidden entry becomes."""
    similarity: Correlation = "pearson"

    @property
    def drawn(self) -> Literal["pixel", "channel", "patch"]:
        return self.entries or ("channel" if self.semantics == "quantus-0.6" else "pixel")


@METRICS.register("faithfulness_correlation")
class FaithfulnessCorrelation(PlanMetric):
    """Correlation over random subsets S of (relevance in S) with (output minus output without S), in [-1, 1].

    Bhatt et al. 2020 (there: over subsets of fixed size against a baseline). The subsets do not look at the
    map, so one plan serves every explainer. 224 scattered pixels hardly move a model of 16x16 tokens; `entries="patch"`
    hides whole tokens instead. Deviations from Quantus 0.6: maps are normalised one by one, draws are keyed per image.
    """

    name = "faithfulness_correlation"
    title = "Faithfulness Correlation"
    family = "faithfulness"
    paper = "Bhatt et al. 2020, Evaluating and aggregating feature-based model explanations"
    higher_is_better = True
    bounds = (-1.0, 1.0)
    plan_uses_map = False
    Options = FaithfulnessCorrelationOptions
    options: FaithfulnessCorrelationOptions

    SCATTERED_SUBSET = 224
    """Quantus's default subset size, in entries."""

    def plan(self, view: ImageView) -> PerturbationPlan:
        """One subset per run, drawn without replacement from the image's key; at most as many entries as there are."""
        options, generator = self.options, view.key.generator("faithfulness_correlation")
        channels, height, width = view.shape_CHW
        if options.drawn == "patch":
            patches = patches_of(view)
            size = min(options.subset_size or max(1, patches.num // 4), patches.num)
            keep_SM = np.ones((options.num_runs, patches.num_segments), bool)
            for keep_M in keep_SM:
                keep_M[generator.choice(patches.num, size, replace=False)] = False
            return SuperpixelPlan(segments_HW=patches.segments_HW, keep_SM=keep_SM, baseline=options.baseline)
        num_entries = height * width * (channels if options.drawn == "channel" else 1)
        size = min(options.subset_size or self.SCATTERED_SUBSET, num_entries)
        index_SK = np.stack([generator.choice(num_entries, size, replace=False) for _ in range(options.num_runs)])
        return SubsetPlan(index_SK=index_SK.astype(np.int32), entries=options.drawn, baseline=options.baseline)

    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        """The correlation; NotScoredError(zero_denominator) where all sums or all output drops are equal."""
        itself, copies_S = outputs(view, logits_SK, self.options)
        relevance_S = hidden_relevance(read_map(view.pixels_HW, self.options), plan)
        return correlation(relevance_S, itself - copies_S, self.options.similarity)

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        return self.options.num_runs

    def cell_key(self) -> str:
        options = self.options
        return f"subsets:{options.drawn}:{options.num_runs}:{options.subset_size}:{options.baseline}"


def hidden_relevance(values_HW: NDArray[np.float64], plan: PerturbationPlan) -> NDArray[np.float64]:
    """Sum of the map over what each copy hides (S,); a channel entry carries its pixel's value."""
    if isinstance(plan, SubsetPlan):
        relevance_S: NDArray[np.float64] = values_HW.ravel()[plan.index_SK % values_HW.size].sum(1)
        return relevance_S
    if isinstance(plan, SuperpixelPlan):
        return (~plan.keep_SM).astype(np.float64) @ sums_by_segment(values_HW, plan.segments_HW)
    raise TypeError(f"a subset or superpixel plan is needed, received {type(plan).__name__}")

"""A map and a mask of what should matter in, how well the one finds the other out. No model, no perturbation.

Shape letters: H W pixels, N = H*W.
"""

from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.errors import NotScoredError
from xaibatch.metrics.base import METRICS, MapMetric, MapView
from xaibatch.metrics.curves import order_of
from xaibatch.metrics.reading import MapReading, own_pixels, positive_mass, read_map
from xaibatch.metrics.similarity import FLAT, mean_ranks
from xaibatch.metrics.ties import levels
from xaibatch.options import Options
from xaibatch.types import NEGATIVE_MAP, ZERO_DENOMINATOR


class MaskedMap(MapReading):
    """Options of every metric that compares a map with a mask."""

    mask: str = "lesion"
    """Name of the mask; an image without it, or with an empty one, is not scored."""


class LocalisationMetric(MapMetric):
    """Base: which map and mask are compared."""

    family = "localisation"
    higher_is_better: bool | None = True
    bounds = (0.0, 1.0)
    needs = frozenset({"mask"})
    Options: ClassVar[type[Options]] = MaskedMap
    options: Any

    def read(self, view: MapView) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The map (N,) as the options want it, and the mask (N,)."""
        mask_HW = view.mask(self.options.mask)
        return read_map(view.pixels_HW, self.options).ravel(), mask_HW.ravel()


class PointingGameOptions(MaskedMap):
    weighted: bool = False
    """A hit counts 1 - (the mask's share of the image) instead of 1. Quantus 0.6 raises an error there."""


@METRICS.register("pointing_game")
class PointingGame(LocalisationMetric):
    """1 if the map's largest value lies in the mask, else 0 (Zhang et al. 2018); any of several equal
    ones.

    No tolerance in pixels, as in Quantus (the paper: 15).
    """

    name = "pointing_game"
    title = "Pointing Game"
    paper = "Zhang et al. 2018, Top-down neural attention by excitation backprop"
    Options = PointingGameOptions
    options: PointingGameOptions

    def score(self, view: MapView) -> float:
        values_N, mask_N = self.read(view)
        level_N = levels(values_N)
        hit = bool(mask_N[level_N == level_N.max()].any())
        return hit * (1 - float(mask_N.mean()) if self.options.weighted else 1.0)


class TopKIntersectionOptions(MaskedMap):
    k: int = Field(1000, ge=1)
    """How many of the most relevant pixels are looked at."""
    concept_influence: bool = False
    """Multiply by pixels / mask pixels, so that 1 is what a random map gets."""


@METRICS.register("top_k_intersection")
class TopKIntersection(LocalisationMetric):
    """Share of the k most relevant pixels that lie in the mask (Theiner et al. 2022)."""

    name = "top_k_intersection"
    title = "Top-K Intersection"
    paper = "Theiner et al. 2022, Interpretable semantic photo geolocation"
    Options = TopKIntersectionOptions
    options: TopKIntersectionOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.concept_influence:
            self.bounds = (0.0, inf)

    def score(self, view: MapView) -> float:
        values_N, mask_N = self.read(view)
        share = float(mask_N[order_of(values_N, "descending")[: self.options.k]].mean())
        return share * len(mask_N) / float(mask_N.sum()) if self.options.concept_influence else share


class RelevanceMassOptions(MaskedMap):
    mass: Literal["positive", "signed"] = "positive"
    """`positive`: the positive part of the explainer's own map, before the run's normalisation (`abs`: its magnitude);
    `signed`: the sum of all values of the map as other metrics read it (Quantus 0.6), which is a share only where none
    is negative, and may be anything where positive and negative ones nearly cancel."""


@METRICS.register("relevance_mass_accuracy")
class RelevanceMassAccuracy(LocalisationMetric):
    """Share of the map's positive relevance that lies in the mask, 0 to 1 (Arras et al. 2022).

    The paper has heatmaps without negative values. Quantus 0.6 divides signed sums; under `mass="signed"` so does this,
    with neither limits nor a direction (unless `abs` is set).
    """

    name = "relevance_mass_accuracy"
    title = "Relevance Mass Accuracy"
    paper = "Arras et al. 2022, CLEVR-XAI: a benchmark dataset for the ground truth evaluation of explanations"
    Options = RelevanceMassOptions
    options: RelevanceMassOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.mass == "signed" and not self.options.abs:
            self.higher_is_better, self.bounds = None, (-inf, inf)

    def score(self, view: MapView) -> float:
        if self.options.mass == "signed":
            return _share(*self.read(view), "the signed map sums to zero")
        mask_HW = view.mask(self.options.mask)
        mass_HW = np.abs(own_pixels(view)) if self.options.abs else positive_mass(view)
        return _share(mass_HW, mask_HW, "the map has no positive relevance")


@METRICS.register("relevance_rank_accuracy")
class RelevanceRankAccuracy(LocalisationMetric):
    """Share of the mask found by as many of the most relevant pixels as it has (Arras et al. 2022)."""

    name = "relevance_rank_accuracy"
    title = "Relevance Rank Accuracy"
    paper = "Arras et al. 2022, CLEVR-XAI: a benchmark dataset for the ground truth evaluation of explanations"

    def score(self, view: MapView) -> float:
        values_N, mask_N = self.read(view)
        size = int(mask_N.sum())
        return float(mask_N[order_of(values_N, "descending")[:size]].sum()) / size


class AttributionLocalisationOptions(MaskedMap):
    abs: bool = True
    positive_attributions: bool = False
    """Count positive relevance only."""
    weighted: bool = False
    """Multiply by image size / mask size, the paper's weighted form (Quantus multiplies by the inverse, and takes the
    image's size from the wrong axis)."""


@METRICS.register("attribution_localisation")
class AttributionLocalisation(LocalisationMetric):
    """Relevance in the mask over all relevance, of |map| by default (Kohlbrenner et al. 2020).

    Without `abs` and `positive_attributions` a map with negative values is not scored: its parts may exceed the whole.
    Quantus 0.6 gives NaN only where more than the whole lies in the mask.
    """

    name = "attribution_localisation"
    title = "Attribution Localisation"
    paper = "Kohlbrenner et al. 2020, Towards best practice in explaining neural network decisions with LRP"
    Options = AttributionLocalisationOptions
    options: AttributionLocalisationOptions

    OFFSET = 1e-9
    """Added to the total, as the reference does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.weighted:
            self.bounds = (0.0, inf)

    def score(self, view: MapView) -> float:
        values_N, mask_N = self.read(view)
        if self.options.positive_attributions:
            values_N = np.maximum(values_N, 0)
        if (values_N < 0).any():
            raise NotScoredError(
                NEGATIVE_MAP, "a share of signed relevance is undefined: set abs or positive_attributions"
            )
        share = _share(values_N, mask_N, "no relevance to localise", self.OFFSET)
        return share / float(mask_N.mean()) if self.options.weighted else share


@METRICS.register("localisation_auc")
class LocalisationAuc(LocalisationMetric):
    """Area under the ROC curve of the map as a detector of the mask's pixels: 0.5 is chance (Fawcett 2006).

    Equal to the share of (inside, outside) pairs in which the inside pixel has more relevance, ties counting half.
    """

    name = "localisation_auc"
    title = "Localisation AUC"
    paper = "Fawcett 2006, An introduction to ROC analysis"

    def score(self, view: MapView) -> float:
        values_N, mask_N = self.read(view)
        inside, outside = int(mask_N.sum()), int((~mask_N).sum())
        if outside == 0:
            raise NotScoredError(ZERO_DENOMINATOR, "the mask covers the whole image: there is no outside")
        rank_sum = float(mean_ranks(values_N)[mask_N].sum())
        return (rank_sum - inside * (inside + 1) / 2) / (inside * outside)


class LungOptions(Options):
    mask: str = "lung"
    """Name of the mask of both lungs."""


@METRICS.register("relevance_outside_lungs")
class RelevanceOutsideLungs(MapMetric):
    """Share of the positive relevance that lies outside the lungs, 0 to 1: what a model that cheats looks at.

    The explainer's own positive part counts, before the run's normalisation. Compare with the share of the image that
    lies outside the lungs, which a map without preference gets. After the lung-mask check of COVID-QU-Ex studies
    (Tahir et al. 2021).
    """

    name = "relevance_outside_lungs"
    title = "Relevance outside the lungs"
    family = "localisation"
    paper = "after Tahir et al. 2021, COVID-19 infection localization and severity grading from chest X-ray images"
    higher_is_better = False
    bounds = (0.0, 1.0)
    needs = frozenset({"mask"})
    Options = LungOptions
    options: LungOptions

    def score(self, view: MapView) -> float:
        mask_HW = view.mask(self.options.mask)
        mass_HW = positive_mass(view)
        return _share(mass_HW, ~mask_HW, "the map has no positive relevance")


def _share(values: NDArray[np.float64], chosen: NDArray[np.bool_], reason: str, offset: float = 0.0) -> float:
    """Sum of the chosen values over the sum of all, which must be more than the rounding of values that cancel."""
    total = float(values.sum())
    if abs(total) <= FLAT * float(np.abs(values).sum()):
        raise NotScoredError(ZERO_DENOMINATOR, reason)
    return float(values[chosen].sum()) / (total + offset)

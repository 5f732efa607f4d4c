"""Maps of noisy copies in, how far they move from the map of the image itself out: Average and Max Sensitivity.

Shape letters: C channels, H W pixels, V noisy copies.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.errors import NotScoredError
from xaibatch.metrics.base import METRICS, ImageView, MapView, NoisyVariant, VariantMetric, VariantView
from xaibatch.metrics.reading import MapReading, read_map
from xaibatch.perturb.plans import GaussianNoisePlan, UniformNoisePlan
from xaibatch.types import CHANGED_PREDICTION, ZERO_DENOMINATOR


class NoisyCopies(MapReading):
    """Options of every metric that explains copies of the image with uniform noise."""

    num_samples: int = Field(10, ge=1)
    """Noisy copies, each explained by every explainer (Quantus: 200, which would be 100,000 passes for LIME)."""
    target: Literal["as_configured", "original"] = "as_configured"
    """Which class the copies' maps explain: as configured for the run (the class predicted for that very copy), or the
    class explained for the image itself."""
    draws: Literal["fresh", "paired"] = "fresh"
    """Random numbers of an explainer that needs some: new ones for each copy (also measures sampling noise), or the
    image's own."""
    null_on_changed_prediction: bool = False
    """Leave the image unscored if noise changes the predicted class (Quantus: return_nan_when_prediction_changes)."""


class SensitivityOptions(NoisyCopies):
    normalise: bool = False
    semantics: Literal["quantus-0.6", "paper-2023"] = "quantus-0.6"
    """What the change is divided by: the norm of the map (Quantus 0.6), or the norm of the image (the study)."""
    radius: float = Field(0.2, gt=0)
    """Noise is uniform in [-radius, radius) per channel entry, in units of the normalised image."""


def noisy_variants(plan: UniformNoisePlan | GaussianNoisePlan, options: NoisyCopies) -> tuple[NoisyVariant, ...]:
    """One variant per noisy copy. A copy's noise depends on image, repeat and its number only, never on how many."""
    return tuple(
        NoisyVariant(plan=plan, sample=sample, target=options.target, draws=options.draws)
        for sample in range(plan.num_samples)
    )


def refuse_changed_predictions(view: MapView, answers: tuple[VariantView, ...], options: NoisyCopies) -> None:
    """Raise NotScoredError(changed_prediction) if the option says so and noise changed a predicted class."""
    if not options.null_on_changed_prediction:
        return
    num_changed = sum(int(answer.logits_K.argmax()) != view.predicted for answer in answers)
    if num_changed:
        raise NotScoredError(
            CHANGED_PREDICTION, f"noise changed the predicted class of {num_changed} of {len(answers)} copies"
        )


def copies_maps(answers: tuple[VariantView, ...], reading: MapReading) -> Iterator[NDArray[np.float64]]:
    """The copies' pixel maps (H,W) one by one; a map that cannot be read is refused with the number of its copy."""
    for number, answer in enumerate(answers):
        try:
            yield read_map(answer.pixels_HW, reading)
        except NotScoredError as error:
            raise NotScoredError(error.status, f"noisy copy {number}: {error.reason}") from None


class Sensitivity(VariantMetric):
    """Relative change ||map - map of copy|| / norm for each noisy copy; subclasses reduce the copies to one score.

    Yeh et al. 2019 have the bare maximum of ||map - map'|| over a ball. Dividing by the map's norm
    (Quantus 0.6) makes explainers of different scale comparable; dividing by the image's (the study) does not.
    """

    family = "robustness"
    paper = "Yeh et al. 2019, On the (in)fidelity and sensitivity of explanations"
    higher_is_better = False
    bounds = (0.0, float("inf"))
    Options = SensitivityOptions
    options: SensitivityOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options.semantics == "paper-2023":
            self.needs = self.needs | {"image"}

    def variants(self, view: ImageView) -> tuple[NoisyVariant, ...]:
        radius, num_samples = self.options.radius, self.options.num_samples
        plan = UniformNoisePlan(key=view.key, num_samples=num_samples, low=-radius, high=radius)
        return noisy_variants(plan, self.options)

    def num_variants(self) -> int:
        return self.options.num_samples

    def cell_key(self) -> str:
        options = self.options
        return f"noise:{-options.radius}:{options.radius}:{options.num_samples}:{options.target}:{options.draws}"

    def changes(self, view: MapView, answers: tuple[VariantView, ...]) -> NDArray[np.float64]:
        """The relative change of the map for every copy (V,)."""
        refuse_changed_predictions(view, answers, self.options)
        original_HW = read_map(view.pixels_HW, self.options)
        scale = original_HW if self.options.semantics == "quantus-0.6" else np.asarray(view.image(), np.float64)
        norm = np.linalg.norm(scale)
        if norm == 0:
            raise NotScoredError(ZERO_DENOMINATOR, "the norm that the change is divided by is zero")
        moved_V = [np.linalg.norm(original_HW - copy_HW) for copy_HW in copies_maps(answers, self.options)]
        return np.array(moved_V) / norm


@METRICS.register("avg_sensitivity")
class AvgSensitivity(Sensitivity):
    """Mean over the noisy copies of the map's relative change."""

    name = "avg_sensitivity"
    title = "Average Sensitivity"

    def score(self, view: MapView, answers: tuple[VariantView, ...]) -> float:
        return float(self.changes(view, answers).mean())


@METRICS.register("max_sensitivity")
class MaxSensitivity(Sensitivity):
    """Largest relative change of the map among the noisy copies."""

    name = "max_sensitivity"
    title = "Max Sensitivity"

    def score(self, view: MapView, answers: tuple[VariantView, ...]) -> float:
        return float(self.changes(view, answers).max())

"""Maps of noisy copies in, how fast they move with the image or the output out: Lipschitz estimate, relative
stabilities.

Shape letters: C channels, H W pixels, K classes, V noisy copies.
"""

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.metrics.base import METRICS, ImageView, MapView, NoisyVariant, VariantMetric, VariantView
from xaibatch.metrics.reading import Output, model_output, read_map
from xaibatch.metrics.sensitivity import NoisyCopies, copies_maps, noisy_variants, refuse_changed_predictions
from xaibatch.perturb.plans import GaussianNoisePlan, UniformNoisePlan


class LipschitzOptions(NoisyCopies):
    mean: float = 0.0
    """Mean of the normal noise, in units of the normalised image."""
    std: float = Field(0.1, gt=0)
    """Standard deviation of the normal noise, in units of the normalised image."""


@METRICS.register("local_lipschitz_estimate")
class LocalLipschitzEstimate(VariantMetric):
    """Largest ||map - map of copy|| / ||image - copy|| among copies with normal noise; 0 is a map that never moves.

    Alvarez-Melis and Jaakkola 2018; like Quantus over normal noise and with 1e-10 added to the distance.
    """

    name = "local_lipschitz_estimate"
    title = "Local Lipschitz Estimate"
    family = "robustness"
    paper = "Alvarez-Melis and Jaakkola 2018, On the robustness of interpretability methods"
    higher_is_better = False
    bounds = (0.0, float("inf"))
    Options = LipschitzOptions
    options: LipschitzOptions

    OFFSET = 1e-10
    """Added to the distance of the images, as the reference does."""

    def variants(self, view: ImageView) -> tuple[NoisyVariant, ...]:
        options = self.options
        plan = GaussianNoisePlan(
            key=view.key,
            purpose="local_lipschitz_estimate",
            num_samples=options.num_samples,
            mean=options.mean,
            std=options.std,
        )
        return noisy_variants(plan, options)

    def num_variants(self) -> int:
        return self.options.num_samples

    def score(self, view: MapView, answers: tuple[VariantView, ...]) -> float:
        refuse_changed_predictions(view, answers, self.options)
        original_HW = read_map(view.pixels_HW, self.options)
        slopes = [
            np.linalg.norm(original_HW - copy_HW) / (np.linalg.norm(noise_CHW) + self.OFFSET)
            for copy_HW, noise_CHW in zip(copies_maps(answers, self.options), noise_of(self, view), strict=True)
        ]
        return float(max(slopes))

    def cell_key(self) -> str:
        options = self.options
        return f"normal noise:{options.mean}:{options.std}:{options.num_samples}:{options.target}:{options.draws}"


class RelativeStabilityOptions(NoisyCopies):
    normalise: bool = False
    null_on_changed_prediction: bool = True
    low: float = 0.02
    high: float = 0.2
    """Noise is uniform in [low, high) per channel entry, in units of the normalised image. That it is never negative is
    Quantus's default; low=-0.2 makes it symmetric."""
    eps_min: float = Field(1e-6, gt=0)
    """Stands for a zero wherever one would be divided by."""


class RelativeStability(VariantMetric):
    """Largest ratio of the map's relative change to another change among the noisy copies (Agarwal et al. 2022).

    The relative change is ||(map - map of copy) / map||, entry by entry; a map with near-zero entries makes it huge,
    and with it float32's rounding: the batch size was seen to move a score by 7e-4 of itself (in float64 by 5e-12).
    """

    family = "robustness"
    higher_is_better = False
    bounds = (0.0, float("inf"))
    Options = RelativeStabilityOptions
    options: RelativeStabilityOptions

    @abstractmethod
    def changes(self, view: MapView, answers: tuple[VariantView, ...]) -> NDArray[np.float64]:
        """What the map's relative change is divided by, for every copy (V,)."""

    def variants(self, view: ImageView) -> tuple[NoisyVariant, ...]:
        options = self.options
        plan = UniformNoisePlan(key=view.key, num_samples=options.num_samples, low=options.low, high=options.high)
        return noisy_variants(plan, options)

    def num_variants(self) -> int:
        return self.options.num_samples

    def score(self, view: MapView, answers: tuple[VariantView, ...]) -> float:
        refuse_changed_predictions(view, answers, self.options)
        original_HW, eps = read_map(view.pixels_HW, self.options), self.options.eps_min
        moved_V = np.array(
            [
                np.linalg.norm((original_HW - copy_HW) / non_zero(original_HW, eps))
                for copy_HW in copies_maps(answers, self.options)
            ]
        )
        return float((moved_V / non_zero(self.changes(view, answers), eps)).max())

    def cell_key(self) -> str:
        options = self.options
        return f"noise:{options.low}:{options.high}:{options.num_samples}:{options.target}:{options.draws}"


@METRICS.register("relative_input_stability")
class RelativeInputStability(RelativeStability):
    """The map's relative change over the image's: Agarwal et al. 2022."""

    name = "relative_input_stability"
    title = "Relative Input Stability"
    paper = "Agarwal et al. 2022, Rethinking stability for attribution-based explanations"
    needs = frozenset({"image"})

    def changes(self, view: MapView, answers: tuple[VariantView, ...]) -> NDArray[np.float64]:
        image_CHW = np.asarray(view.image(), np.float64)
        divisor_CHW = non_zero(image_CHW, self.options.eps_min)
        return np.array([np.linalg.norm(noise_CHW / divisor_CHW) for noise_CHW in noise_of(self, view)])


class OutputStabilityOptions(RelativeStabilityOptions):
    output: Output = "logit"
    """Which outputs' distance the map's change is divided by."""


@METRICS.register("relative_output_stability")
class RelativeOutputStability(RelativeStability):
    """The map's relative change over the change of the model's outputs: Agarwal et al. 2022."""

    name = "relative_output_stability"
    title = "Relative Output Stability"
    paper = "Agarwal et al. 2022, Rethinking stability for attribution-based explanations"
    Options = OutputStabilityOptions
    options: OutputStabilityOptions

    def changes(self, view: MapView, answers: tuple[VariantView, ...]) -> NDArray[np.float64]:
        itself_K = model_output(view.logits_K, self.options.output)
        copies = (model_output(answer.logits_K, self.options.output) for answer in answers)
        return np.array([np.linalg.norm(itself_K - copy_K) for copy_K in copies])


def noise_of(metric: "LocalLipschitzEstimate | RelativeStability", view: ImageView) -> list[NDArray[np.float64]]:
    """The noise (C,H,W) of every copy, drawn again from the key."""
    return [ask.plan.noise_CHW(ask.sample, view.shape_CHW) for ask in metric.variants(view)]


def non_zero(values: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    """The values with zeros replaced by eps."""
    return values + (values == 0) * eps

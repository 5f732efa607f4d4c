"""Maps for another class or of a model with new weights in, how alike they are to the map out: sanity checks.

New weights are drawn anew for every image and repeat, so that an interval over patients holds their chance too: one set
moves the scores of all images together. All explainers, and all metrics of this file, face the same ones.

Shape letters: H W pixels, K classes, V variants.
"""

import itertools
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from xaibatch.errors import NotScoredError
from xaibatch.maps import pixel_map
from xaibatch.metrics.base import (
    METRICS,
    ImageView,
    MapView,
    NoisyVariant,
    TargetVariant,
    Variant,
    VariantMetric,
    VariantView,
    WeightsVariant,
)
from xaibatch.metrics.reading import MapReading, read_map
from xaibatch.metrics.similarity import correlation, structural_similarity
from xaibatch.perturb.plans import GaussianNoisePlan
from xaibatch.seeding import DrawKey, keyed_generator
from xaibatch.types import ZERO_DENOMINATOR

Similarity = Literal["ssim", "ssim_flat", "pearson", "spearman"]
"""How alike two maps are: structural similarity of the maps, or of their pixels in one row (Quantus), or
correlations."""


def map_similarity(a_HW: NDArray[np.float64], b_HW: NDArray[np.float64], how: Similarity) -> float:
    """Similarity of two maps, 1 for equal ones, in [-1, 1]."""
    if how == "ssim":
        return structural_similarity(a_HW, b_HW)
    if how == "ssim_flat":
        return structural_similarity(a_HW.ravel(), b_HW.ravel())
    return correlation(a_HW.ravel(), b_HW.ravel(), how)


class RandomLogitOptions(MapReading):
    semantics: Literal["quantus-0.6", "sixt-2020"] = "quantus-0.6"
    """`quantus-0.6`: structural similarity of the maps' pixels laid out in one row; `sixt-2020`: of the maps."""
    similarity: Similarity | None = None
    """None: by `semantics`."""


@METRICS.register("random_logit")
class RandomLogit(VariantMetric):
    """Similarity of the map to the map for another class, drawn at random; a map that depends on the class scores low.

    Sixt et al. 2020. Quantus draws the class from NumPy's global stream, seeded anew for every batch, so
    that it depends on the place in the batch; here it hangs on the image.
    """

    name = "random_logit"
    title = "Random Logit"
    family = "randomisation"
    paper = "Sixt et al. 2020, When explanations lie: why many modified BP attributions fail"
    higher_is_better = False
    bounds = (-1.0, 1.0)
    Options = RandomLogitOptions
    options: RandomLogitOptions

    def variants(self, view: ImageView) -> tuple[TargetVariant, ...]:
        explained = view.target if view.target >= 0 else view.predicted
        others = np.delete(np.arange(len(view.logits_K)), explained)
        if len(others) == 0:
            raise NotScoredError(ZERO_DENOMINATOR, "the model has one class only: there is no other to explain")
        return (TargetVariant(target=int(view.key.generator("random_logit").choice(others))),)

    def num_variants(self) -> int:
        return 1

    def score(self, view: MapView, answers: tuple[VariantView, ...]) -> float:
        how: Similarity = self.options.similarity or (
            "ssim_flat" if self.options.semantics == "quantus-0.6" else "ssim"
        )
        other_HW = read_map(answers[0].pixels_HW, self.options)
        return map_similarity(read_map(view.pixels_HW, self.options), other_HW, how)

    def cell_key(self) -> str:
        return "random logit"


STAGE_SHARES: Final = tuple(num_layers / 75 for num_layers in (2, 8, 14, 26, 50, 75))
"""Shares of the model's layers at the default stages: six different models wherever there are 15 layers or more."""


class NewWeights(MapReading):
    """Options of every metric that explains models with new weights."""

    num_draws: int | None = Field(None, ge=1)
    """Sets of new weights that the images of a repeat are spread over, by their ids; None: every image has its own. A
    small number is cheaper: the models of a set are built once a shard, all stages in about the time of one forward
    pass on a CPU, and its images are explained in one batch. But its images move together, which an interval over
    patients does not see: it is then conditional on these sets, and only `repeats` show how far they move a score."""
    seed: int | None = None
    """None: weights hang on the run's seed, the repeat and the image (or its set). A number fixes one set for all
    images, repeats and runs (Quantus: 42): repeats then agree, and every interval is conditional on that set."""

    @model_validator(mode="after")
    def _one_set_has_one_seed(self) -> Self:
        if self.seed is not None and (self.num_draws or 1) > 1:
            raise ValueError(
                f"`seed` fixes one set of new weights, so num_draws={self.num_draws} has no meaning: leave one out"
            )
        return self

    def weights_seed(self, key: DrawKey) -> int:
        """What an image's new weights are drawn from."""
        if self.seed is not None:
            return self.seed
        generator = key.generator("new_weights")
        if self.num_draws is not None:
            place = int(key.generator("new_weights_set").integers(self.num_draws))
            generator = keyed_generator(key.seed, "", f"new_weights_of_set:{place}", key.repeat)
        return int(generator.integers(2**63 - 1))


class MprtOptions(NewWeights):
    abs: bool = True
    order: Literal["top_down", "bottom_up", "independent"] = "top_down"
    """Layers re-initialised from the head down, from the input up (both cascading), or one at a time."""
    stages: tuple[int, ...] | None = Field(None, min_length=1)
    """How many layers are re-initialised at each stage, -1 all of them (under `independent`: which layer, counted from
    the head). None: the shares of the model's layers that a ViT of twelve blocks has in its head and last norm, then
    with one, two, four and eight of its blocks too, then everything. Quantus goes through every layer."""
    similarity: Similarity = "spearman"

    @property
    def num_stages(self) -> int:
        return len(self.stages or STAGE_SHARES)

    def changed_models(self, key: DrawKey, noisy: NoisyVariant | None = None) -> tuple[WeightsVariant, ...]:
        """The question for each stage: the image (or a noisy copy) on the model with new weights."""
        seed = self.weights_seed(key)
        if self.stages is None:
            return tuple(
                WeightsVariant(order=self.order, num_layers=None, share=share, seed=seed, noisy=noisy)
                for share in STAGE_SHARES
            )
        return tuple(
            WeightsVariant(order=self.order, num_layers=stage, seed=seed, noisy=noisy) for stage in self.stages
        )


@METRICS.register("mprt")
class Mprt(VariantMetric):
    """Mean similarity over the stages of the map to the map of the model with new weights; a faithful map scores low.

    Adebayo et al. 2018 (model parameter randomisation test). Quantus's average also counts the unchanged
    model, which compares the map with itself; here it does not. Quantus gives all images the same new weights
    (`seed`).
    """

    name = "mprt"
    title = "Model Parameter Randomisation Test"
    family = "randomisation"
    paper = "Adebayo et al. 2018, Sanity checks for saliency maps"
    higher_is_better = False
    bounds = (-1.0, 1.0)
    Options = MprtOptions
    options: MprtOptions

    def variants(self, view: ImageView) -> tuple[Variant, ...]:
        return self.options.changed_models(view.key)

    def num_variants(self) -> int:
        return self.options.num_stages

    def similarities(self, view: MapView, answers: tuple[VariantView, ...]) -> NDArray[np.float64]:
        """Similarity of the map to that of each stage (V,)."""
        original_HW = read_map(view.pixels_HW, self.options)
        return np.array(
            [
                map_similarity(original_HW, read_map(answer.pixels_HW, self.options), self.options.similarity)
                for answer in answers
            ]
        )

    def score(self, view: MapView, answers: tuple[VariantView, ...]) -> float:
        return float(self.similarities(view, answers).mean())

    def cell_key(self) -> str:
        options = self.options
        return weights_key(options, options.order, options.stages)


class EfficientMprtOptions(NewWeights):
    normalise: bool = False
    num_bins: int = Field(100, ge=2)
    """Bins of the histogram whose entropy is taken."""


@METRICS.register("efficient_mprt")
class EfficientMprt(VariantMetric):
    """Relative rise of the map's complexity when all weights are new: (H' - H) / H; a faithful map's complexity rises.

    Hedström et al. 2023, with the entropy (nats) of the map's histogram.
    """

    name = "efficient_mprt"
    title = "Efficient MPRT"
    family = "randomisation"
    paper = "Hedström et al. 2023, Sanity checks revisited: an exploration to repair the MPRT"
    higher_is_better = True
    bounds = (-1.0, float("inf"))
    Options = EfficientMprtOptions
    options: EfficientMprtOptions

    def variants(self, view: ImageView) -> tuple[Variant, ...]:
        return (WeightsVariant(order="bottom_up", num_layers=-1, seed=self.options.weights_seed(view.key)),)

    def num_variants(self) -> int:
        return 1

    def score(self, view: MapView, answers: tuple[VariantView, ...]) -> float:
        maps = (view.pixels_HW, answers[0].pixels_HW)
        before, after = (histogram_entropy(read_map(m, self.options), self.options.num_bins) for m in maps)
        if before == 0:
            raise NotScoredError(ZERO_DENOMINATOR, "the map's histogram has one filled bin only: its entropy is zero")
        return (after - before) / before

    def cell_key(self) -> str:
        return weights_key(self.options, "bottom_up", (-1,))


def weights_key(options: NewWeights, order: str, stages: tuple[int, ...] | None) -> str:
    """Equal for metrics that explain the same models."""
    return f"weights:{order}:{stages}:{options.seed}:{options.num_draws}"


def histogram_entropy(values_HW: NDArray[np.float64], num_bins: int) -> float:
    """Entropy (nats) of the histogram of the map's values, bins from the smallest to the largest."""
    counts, _ = np.histogram(values_HW, num_bins)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


class SmoothMprtOptions(MprtOptions):
    order: Literal["top_down", "bottom_up", "independent"] = "bottom_up"
    stages: tuple[int, ...] | None = Field((-1,), min_length=1)
    num_samples: int = Field(10, ge=2)
    """Maps averaged for each model: noisy copies, and the image itself as the last (Quantus: 50)."""
    noise_magnitude: float = Field(0.1, gt=0)
    """Standard deviation of the noise, as a share of the image's range."""
    draws: Literal["fresh", "paired"] = "fresh"
    """Random numbers of an explainer that needs some: new ones for each noisy copy, or the image's own."""


@METRICS.register("smooth_mprt")
class SmoothMprt(VariantMetric):
    """As `mprt`, each map being the mean of maps of noisy copies, which takes out the noise of gradient maps.

    Hedström et al. 2023. The explainer's own maps are averaged, then brought to pixels. Quantus 0.6 calls
    `quantus.explain` for the noisy copies and ignores the explainer it was given.
    """

    name = "smooth_mprt"
    title = "Smooth MPRT"
    family = "randomisation"
    paper = "Hedström et al. 2023, Sanity checks revisited: an exploration to repair the MPRT"
    higher_is_better = False
    bounds = (-1.0, 1.0)
    needs = frozenset({"image"})
    Options = SmoothMprtOptions
    options: SmoothMprtOptions

    def variants(self, view: ImageView) -> tuple[Variant, ...]:
        """The noisy copies of the model itself, then for each stage its noisy copies and the image."""
        options, image_CHW = self.options, view.image()
        std = options.noise_magnitude * float(image_CHW.max() - image_CHW.min())
        plan = GaussianNoisePlan(
            key=view.key, purpose="smooth_mprt", num_samples=options.num_samples - 1, mean=0.0, std=std
        )
        noisy = [
            NoisyVariant(plan=plan, sample=sample, target="original", draws=options.draws)
            for sample in range(plan.num_samples)
        ]
        copies_by_stage = zip(*(options.changed_models(view.key, copy) for copy in [*noisy, None]), strict=True)
        return (*noisy, *itertools.chain.from_iterable(copies_by_stage))

    def num_variants(self) -> int:
        return self.options.num_samples - 1 + self.options.num_stages * self.options.num_samples

    def score(self, view: MapView, answers: tuple[VariantView, ...]) -> float:
        per_model = self.options.num_samples
        itself = [answer.map_hw for answer in answers[: per_model - 1]]
        smooth_HW = self._smoothed(view, [*itself, view.map_hw])
        similarities = []
        for first in range(per_model - 1, len(answers), per_model):
            maps = [answer.map_hw for answer in answers[first : first + per_model]]
            similarities.append(map_similarity(smooth_HW, self._smoothed(view, maps), self.options.similarity))
        return float(np.mean(similarities))

    def _smoothed(self, view: MapView, maps: list[NDArray[np.floating]]) -> NDArray[np.float64]:
        mean_hw = np.mean(np.asarray(maps, np.float64), 0)
        return read_map(pixel_map(mean_hw, view.shape_CHW[1:], view.map_options), self.options)

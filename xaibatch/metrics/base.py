"""What a metric is: a plan or variants to ask the replica for, and a score from the answers; NumPy only, no torch.

Metrics never call the model. A metric belongs to one of three families:

- `MapMetric`      scores the map alone (complexity, localisation);
- `PlanMetric`     asks for the model's outputs on perturbed copies (faithfulness). A plan that does not look at the map
                   (`plan_uses_map = False`) is run once for all explainers;
- `VariantMetric`  asks for explanations of variants: noisy copies, other target classes, randomised weights, twins.

Shape letters: C channels, H W pixels, h w a map's own sides, K classes, S samples, V variants.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from xaibatch.errors import NotScoredError
from xaibatch.maps import MapOptions, TokenGrid, fitting_grid, pixel_map
from xaibatch.options import Options, validated
from xaibatch.perturb.plans import GaussianNoisePlan, PerturbationPlan, UniformNoisePlan
from xaibatch.registry import Registry
from xaibatch.seeding import DrawKey
from xaibatch.types import MISSING_LABEL, MISSING_MASK, MISSING_TWIN

NOMINAL_GRID: Final = TokenGrid(14, 14, 16, 16)
"""The tokens of a ViT/16 on 224 pixels, for costs said without a model."""


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """What a metric may know of an image without seeing a map: the input of a shared plan.

    label is -1 where the true class is unknown; logits_K are the model's outputs for the image itself (float64);
    `image_CHW` (normalised), `masks` (name -> bool (H,W)) only where the metric's `needs` names them.
    """

    key: DrawKey
    shape_CHW: tuple[int, int, int]
    label: int
    predicted: int
    logits_K: NDArray[np.float64]
    image_CHW: NDArray[np.floating] | None = None
    twin_CHW: NDArray[np.floating] | None = None
    """The lesion-free twin (normalised), where a metric needs it and the image has one; then `image_CHW` too."""
    masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    patch_size: int = 16
    """Side of a patch token in pixels, for steps of as many entries as a token has."""
    grid: TokenGrid | None = None
    """Where the model's tokens lie, for patch-aligned plans; None: squares of patch_size, as many as fit in."""
    target: int = -1
    """The explained class where it is the same for all explainers, -1 where that is not known."""

    @property
    def tokens(self) -> TokenGrid:
        """The model's tokens on the image."""
        return self.grid or fitting_grid((self.shape_CHW[1], self.shape_CHW[2]), self.patch_size)

    def scored_class(self, which: Literal["label", "predicted"]) -> int:
        """The class whose output a faithfulness metric reads; raises NotScoredError if the label is unknown."""
        if which == "predicted":
            return self.predicted
        if self.label < 0:
            raise NotScoredError(MISSING_LABEL, "the metric reads the true label's output and the image has no label")
        return self.label

    def mask(self, name: str) -> NDArray[np.bool_]:
        """The named mask, bool (H,W); raises NotScoredError if the image has none or an empty one."""
        mask = self.masks.get(name)
        if mask is None or not mask.any():
            raise NotScoredError(
                MISSING_MASK, f"the image has no {name!r} mask" if mask is None else f"its {name!r} mask is empty"
            )
        return mask

    def image(self) -> NDArray[np.floating]:
        """The normalised image (C,H,W) of a metric whose `needs` names `image`."""
        if self.image_CHW is None:
            raise ValueError(f"image {self.key.image_id!r} came without its pixels, which the metric's `needs` names")
        return self.image_CHW

    def changed_HW(self) -> NDArray[np.float64]:
        """Mean absolute difference to the lesion-free twin over channels, (H,W); NotScoredError without a twin."""
        if self.twin_CHW is None or not np.isfinite(self.twin_CHW).all():
            raise NotScoredError(MISSING_TWIN, "the image has no lesion-free twin")
        difference = np.abs(np.asarray(self.image(), np.float64) - self.twin_CHW)
        changed: NDArray[np.float64] = difference.mean(0)
        return changed


@dataclass(frozen=True, kw_only=True)
class MapView(ImageView):
    """An image and one explainer's map of it.

    map_hw is the explainer's own map (token grid or pixels); `pixels_HW` is that map at pixel resolution (float64)
    after the run's upsampling and normalisation, which is what Quantus would be given.
    """

    explainer: str
    target: int
    map_hw: NDArray[np.floating]
    map_options: MapOptions

    @cached_property
    def pixels_HW(self) -> NDArray[np.float64]:
        return pixel_map(self.map_hw, self.shape_CHW[1:], self.map_options)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisyVariant:
    """Copy `sample` of a noise plan; its explanation targets the class predicted for that very copy, or the
    original's."""

    plan: UniformNoisePlan | GaussianNoisePlan
    sample: int
    target: Literal["as_configured", "original"] = "as_configured"
    draws: Literal["fresh", "paired"] = "fresh"


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetVariant:
    """The same image, explained for another class."""

    target: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsVariant:
    """The same image and target, explained on a model whose layers (from `order`, the first `num_layers`) were
    re-initialised with draws keyed by (seed, layer name); `num_layers` -1 means all, None the `share` of them."""

    order: Literal["top_down", "bottom_up", "independent"]
    num_layers: int | None
    seed: int
    share: float = 1.0
    """Of the model's layers, above 0 and at most 1, rounded to a whole number of at least one."""
    noisy: NoisyVariant | None = None
    """Explain this noisy copy instead of the image itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TwinVariant:
    """The image's lesion-free twin, explained for the same class as the image."""


Variant = NoisyVariant | TargetVariant | WeightsVariant | TwinVariant


@dataclass(frozen=True, kw_only=True)
class VariantView:
    """The answer to one variant: its map (native), its pixel map, the model's logits on it and the class explained."""

    map_hw: NDArray[np.floating]
    pixels_HW: NDArray[np.float64]
    logits_K: NDArray[np.float64]
    target: int


class Metric(ABC):
    """One metric with its options fixed. Class attributes hold for the default options, an instance's for its own."""

    name: ClassVar[str]
    title: ClassVar[str]
    family: ClassVar[Literal["faithfulness", "robustness", "complexity", "localisation", "randomisation", "causal"]]
    paper: ClassVar[str]
    higher_is_better: bool | None
    """None: neither is better, and reports compare without a verdict. An option may decide."""
    bounds: tuple[float, float]
    """Lowest and highest possible score, infinite where there is no limit. An option may decide."""
    needs: frozenset[str] = frozenset()
    """Any of `image`, `mask`, `label`, `twin`. An instance may need more than its class where an option decides."""
    across_images: ClassVar[bool] = False
    """Compares the images of a shard with each other, so that their scores are not independent."""

    Options: ClassVar[type[Options]] = Options

    def __init__(self, **options: Any) -> None:
        self.options = validated(self.Options, options, f"metric {self.name!r}")

    def check(self) -> None:  # noqa: B027  most metrics have nothing more to check
        """Raise UsageError for options that fail only once the metric is used; called when a new run is prepared, so
        that no forward pass is spent before. May warn of what the scores depend on."""

    def num_forward_passes(
        self, num_explainers: int, shape_CHW: tuple[int, int, int] = (3, 224, 224), grid: TokenGrid = NOMINAL_GRID
    ) -> int:
        """Forward passes on perturbed copies per image and repeat (explanations of variants not counted)."""
        return 0

    def cost(self, shape_CHW: tuple[int, int, int] = (3, 224, 224), grid: TokenGrid = NOMINAL_GRID) -> str:
        """The cost per image for people, as `xaibatch list metrics` prints it."""
        shared, again = (self.num_forward_passes(n, shape_CHW, grid) for n in (1, 2))
        if not shared:
            return "none"
        return f"{shared} forward passes{', shared by all explainers' if again == shared else ' per explainer'}"

    def cell_key(self) -> str:
        """Metrics of equal key ask for the same plan or variants and share one cell; by default nothing is shared."""
        return f"{self.name}:{self.options.model_dump_json()}"


class MapMetric(Metric):
    """Scores the map alone."""

    @abstractmethod
    def score(self, view: MapView) -> float:
        """Return the score, or raise NotScoredError with status and reason."""


class PlanMetric(Metric):
    """Scores the model's outputs on perturbed copies."""

    plan_uses_map: bool = True
    """False: one plan serves all explainers. An instance may differ from its class where an option decides."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if getattr(self.options, "scored_class", None) == "label":
            self.needs = self.needs | {"label"}

    def num_copies(self, shape_CHW: tuple[int, int, int], grid: TokenGrid) -> int:
        """How many copies of an image of this shape and tokens the plan runs, for the estimate before a run."""
        return 0

    def num_forward_passes(
        self, num_explainers: int, shape_CHW: tuple[int, int, int] = (3, 224, 224), grid: TokenGrid = NOMINAL_GRID
    ) -> int:
        return self.num_copies(shape_CHW, grid) * (num_explainers if self.plan_uses_map else 1)

    @abstractmethod
    def plan(self, view: ImageView) -> PerturbationPlan:
        """Which copies to run. `view` is a MapView when `plan_uses_map`, a plain ImageView (no map) otherwise."""

    @abstractmethod
    def score(self, view: MapView, plan: PerturbationPlan, logits_SK: NDArray[np.float64]) -> float:
        """Return the score from the outputs on the plan's copies, or raise NotScoredError."""


class VariantMetric(Metric):
    """Scores how the map answers a change of image, class or weights."""

    @abstractmethod
    def variants(self, view: ImageView) -> tuple[Variant, ...]:
        """Which variants to explain (with every explainer)."""

    @abstractmethod
    def num_variants(self) -> int:
        """How many explanations per image, repeat and explainer the variants are, for the estimate before a run."""

    def cost(self, shape_CHW: tuple[int, int, int] = (3, 224, 224), grid: TokenGrid = NOMINAL_GRID) -> str:
        return f"{self.num_variants()} explanations per explainer"

    @abstractmethod
    def score(self, view: MapView, answers: tuple[VariantView, ...]) -> float:
        """Return the score from the variants' maps, in the order of `variants`, or raise NotScoredError."""


METRICS: Registry[type[Metric]] = Registry("metric")

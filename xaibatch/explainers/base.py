"""What an explainer is: options in, attribution maps of a batch out; the plug-in point of the package.

Shape letters: B images, C channels, H W pixels, h w the map's own sides, K classes, S samples of a plan.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from xaibatch.models.trace import Trace, record
from xaibatch.options import Options, validated
from xaibatch.perturb.plans import PerturbationPlan
from xaibatch.registry import Registry
from xaibatch.seeding import DrawKey

Granularity = Literal["token", "pixel", "segment"]
"""On the token grid (B,g,v); per pixel (B,H,W); per pixel, equal within a superpixel."""

RunPlans = Callable[[Sequence[tuple[int, PerturbationPlan]]], list[NDArray[np.floating]]]
"""Runs (row of the batch, plan) pairs in full batches; returns one logits array (S,K) per pair, in order."""


@dataclass(frozen=True, kw_only=True)
class ExplainInput:
    """Everything an explainer may look at for one batch of images.

    model:       the classifier (images_BCHW -> logits_BK), in eval mode, in the images' dtype and device.
    images_BCHW: normalised images.
    targets_B:   explained class per image, int64.
    keys:        one per image; every random number comes from them.
    run_plans:   expands and runs perturbation plans on these images.
    segments:    superpixels made beforehand, by segmentation name (see `Explainer.segmentation`), int (H,W) per image.
    """

    model: nn.Module
    images_BCHW: Tensor
    targets_B: Tensor
    keys: tuple[DrawKey, ...]
    run_plans: RunPlans
    segments: Mapping[str, Sequence[NDArray[np.int32]]] = field(default_factory=dict)

    @cached_property
    def trace(self) -> Trace:
        """One forward and one backward, recorded on first use and shared by every explainer of this batch."""
        return record(self.model, self.images_BCHW, self.targets_B)


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """maps_Bhw: token grid (B,g,g) or pixels (B,H,W); extras: per-image diagnostics (B,), e.g. `r2`."""

    maps_Bhw: Tensor
    extras: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InputShape:
    """A model's input: height and width in pixels, rows and columns of its tokens."""

    size: tuple[int, int]
    grid: tuple[int, int]


NOMINAL = InputShape(size=(224, 224), grid=(14, 14))
"""The input that `Explainer.cost` speaks of: it is asked for before there is a model."""


class Explainer(ABC):
    """One explanation method with its options fixed.

    Class attributes are what `xaibatch list explainers` prints: `paper` cites the source; `needs` says what the model
    must be (`vit`: a plain timm VisionTransformer; `gradients`; `any`: every timm classifier). The class's `signed`,
    `granularity` and `random` hold for its default options; where they hang on an option, read them of an instance.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[Literal["vit", "gradients", "any"]]

    signed: bool
    """Whether there are negative values; they mean evidence against the target. Without: none are below zero."""
    granularity: Granularity
    """The map's native resolution."""
    random: bool = False
    """Draws random numbers: computed anew for every repeat."""

    Options: ClassVar[type[Options]] = Options

    def __init__(self, **options: Any) -> None:
        self.options = validated(self.Options, options, f"explainer {self.name!r}")

    @abstractmethod
    def explain(self, inputs: ExplainInput) -> Attribution:
        """Return the maps of a batch. Row b depends on image b, its target and its key only."""

    def cost(self) -> str:
        """Forward passes (or their worth) per image, for people: `500 forward passes`, `1 forward + 1 backward`."""
        return "1 forward"

    def num_forward_passes(self, shape: InputShape = NOMINAL) -> int:
        """Model evaluations of perturbed copies per image beyond the shared trace, for the estimate before a run."""
        return 0

    @property
    def segmentation(self) -> str | None:
        """Name of the superpixels this explainer wants beforehand (made beside the model), None if it needs none."""
        return None


EXPLAINERS: Registry[type[Explainer]] = Registry("explainer")

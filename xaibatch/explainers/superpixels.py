"""What explainers on superpixels share: the options that choose the segmentation, and the superpixels of a batch.

Shape letters: B images, C channels, H W pixels, M superpixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from xaibatch.explainers.base import ExplainInput
from xaibatch.options import Options
from xaibatch.perturb.segmentation import Segmentation, segment, segmentation_spec

DEFAULT_PATCH_SIZE = 16
"""Side in pixels of a square of the `grid` segmentation for a model that has no patches of its own."""


class SuperpixelOptions(Options):
    """Which superpixels an explainer shows and hides."""

    segmentation: Segmentation = "quickshift"
    """scikit-image's quickshift (with lime's settings), slic or felzenszwalb, or the ViT's patch `grid`."""

    segmentation_options: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of the scikit-image function, e.g. {"n_segments": 50}, or {"patch_size": 32} (pixels) for `grid`."""

    @property
    def spec(self) -> str:
        """The name under which superpixels made beforehand are handed in (ExplainInput.segments)."""
        return segmentation_spec(self.segmentation, self.segmentation_options)


def superpixels(inputs: ExplainInput, options: SuperpixelOptions) -> Sequence[NDArray[np.int32]]:
    """Return one int32 (H,W) label image per input, labels 0..M-1: those handed in, else made here."""
    if options.spec in inputs.segments:
        return inputs.segments[options.spec]
    images_BCHW = inputs.images_BCHW.detach().cpu().numpy()
    side = patch_size(inputs.model)
    return [segment(image_CHW, options.spec, patch_size=side) for image_CHW in images_BCHW]


def paint(weights_M: NDArray[np.float64], segments_HW: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return every pixel's superpixel weight, float64 (H,W)."""
    return weights_M[segments_HW]


def patch_size(model: nn.Module) -> int:
    """Side in pixels of the model's patch tokens; DEFAULT_PATCH_SIZE for a model without square patches."""
    embedding = getattr(getattr(model, "backbone", model), "patch_embed", None)
    side: Any = getattr(embedding, "patch_size", DEFAULT_PATCH_SIZE)
    if isinstance(side, tuple):
        side = side[0] if side[0] == side[1] else DEFAULT_PATCH_SIZE
    return int(side)

"""What explainers on superpixels share: the options that choose the segmentation, and the superpixels of a batch.

Shape letters: B images, C channels, H W pixels, M superpixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from xaibatch.explainers.base import ExplainInput
from xaibatch.models.token_grid import token_grid_of
from xaibatch.options import Options
from xaibatch.perturb.segmentation import Segmentation, segment, segmentation_spec


class SuperpixelOptions(Options):
    """Which superpixels an explainer shows and hides."""

    segmentation: Segmentation = "quickshift"
    """scikit-image's quickshift (with lime's settings), slic or felzenszwalb, or the ViT's patch `grid`."""

    segmentation_options: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of the scikit-image function, e.g. {"n_segments": 50}; for `grid` {"patch_size": 32}, or [32, 16] for
    height and width, in pixels."""

    @property
    def spec(self) -> str:
        """The name under which superpixels made beforehand are handed in (ExplainInput.segments)."""
        return segmentation_spec(self.segmentation, self.segmentation_options)


def superpixels(inputs: ExplainInput, options: SuperpixelOptions) -> Sequence[NDArray[np.int32]]:
    """Return one int32 (H,W) label image per input, labels 0..M-1: those handed in, else made here."""
    if options.spec in inputs.segments:
        return inputs.segments[options.spec]
    images_BCHW = inputs.images_BCHW.detach().cpu().numpy()
    height, width = inputs.images_BCHW.shape[2:]
    patch = token_grid_of(inputs.model, (height, width)).patch
    return [segment(image_CHW, options.spec, patch_size=patch) for image_CHW in images_BCHW]


def paint(weights_M: NDArray[np.float64], segments_HW: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return every pixel's superpixel weight, float64 (H,W)."""
    return weights_M[segments_HW]

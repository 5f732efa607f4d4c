"""An image in, its superpixels out: int32 (H,W) labels 0..M-1; NumPy and scikit-image only, so that CPU workers need
no torch.

Shape letters: C channels, H W pixels, M superpixels.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from xaibatch.errors import ConfigError, UnknownNameError

Segmentation = Literal["quickshift", "slic", "felzenszwalb", "grid"]
"""scikit-image's algorithms as the `lime` package wraps them, or the squares of the ViT's patch grid."""

LIME_QUICKSHIFT: Final[Mapping[str, float]] = {"kernel_size": 4, "max_dist": 200, "ratio": 0.2}
"""What LimeImageExplainer.explain_instance uses when no segmentation function is given."""


def segmentation_spec(name: Segmentation, options: Mapping[str, Any]) -> str:
    """One string for a segmentation and its options, the same for equal ones: a key for superpixels made beforehand.

    >>> segmentation_spec("quickshift", {}), segmentation_spec("slic", {"n_segments": 40})
    ('quickshift', 'slic:{"n_segments": 40}')
    """
    return f"{name}:{json.dumps(dict(options), sort_keys=True)}" if options else name


def segment(
    image_CHW: NDArray[np.floating],
    name: str,
    options: Mapping[str, Any] | None = None,
    patch_size: int | tuple[int, int] = 16,
) -> NDArray[np.int32]:
    """Return the superpixels of a normalised image, numbered 0..M-1 without gaps.

    `name` is a Segmentation or the string made by `segmentation_spec` (then leave `options` out). Algorithms of
    scikit-image get the image as the `lime` package hands it over: (H,W,C), normalised units and all. `quickshift`
    starts from lime's own settings, the others from scikit-image's defaults; `options` are the algorithm's own
    arguments. `grid` cuts patches of `patch_size` pixels (one side, or height and width; the option `patch_size`
    overrides it); a rest at the border is a smaller piece.

    A grey image is given to scikit-image as three equal channels, as `lime` does, for colours are compared in Lab.
    The image is cast to float32 first, so that a float64 run has the superpixels of a float32 run. Unlike in `lime`,
    labels that start at 1 (slic) are shifted: there the last superpixel could never be hidden.

    Raises UnknownNameError for another name, ConfigError for an option that the algorithm does not have and for a
    number of channels that it cannot read.
    """
    name, _, written = name.partition(":")
    if written:
        options = json.loads(written)
    if name not in get_args(Segmentation):
        raise UnknownNameError("segmentation", name, get_args(Segmentation))
    if name == "grid":
        return patch_grid(image_CHW.shape[1:], **{"patch_size": patch_size, **(options or {})})
    num_channels = len(image_CHW)
    if name == "quickshift" and num_channels not in (1, 3) and (options or {}).get("convert2lab", True):
        raise ConfigError(
            f"segmentation 'quickshift' reads images of 1 or 3 channels, received {num_channels}: "
            "use slic, felzenszwalb or grid"
        )
    colour_CHW = np.repeat(image_CHW, 3, axis=0) if num_channels == 1 else image_CHW
    labels_HW = _algorithm(name, options or {})(np.ascontiguousarray(colour_CHW.transpose(1, 2, 0), np.float32))
    _, dense = np.unique(labels_HW, return_inverse=True)
    return dense.reshape(labels_HW.shape).astype(np.int32)


def patch_grid(size: tuple[int, ...], *, patch_size: int | Sequence[int]) -> NDArray[np.int32]:
    """Return patches of `patch_size` pixels (side, or height and width), row-major like a ViT's tokens, int32 (H,W)."""
    height, width = size
    tall, wide = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    columns = -(-width // wide)
    grid_HW: NDArray[np.int32] = (
        np.arange(height, dtype=np.int32)[:, None] // tall * columns + np.arange(width, dtype=np.int32) // wide
    )
    return grid_HW


def _algorithm(name: str, options: Mapping[str, Any]) -> Any:
    """The `lime` package's wrapper around scikit-image's function."""
    from lime.wrappers.scikit_image import SegmentationAlgorithm  # half a second to import

    arguments = {**(LIME_QUICKSHIFT if name == "quickshift" else {}), **options}
    algorithm = SegmentationAlgorithm(name, **arguments)
    if unknown := sorted(set(arguments) - set(algorithm.target_params)):  # the wrapper drops them without a word
        raise ConfigError(f"segmentation {name!r} of scikit-image has no option {', '.join(map(repr, unknown))}")
    return algorithm

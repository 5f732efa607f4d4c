"""Decoded pixels in, the model's normalised input out, and the same geometry for masks; recorded with every run.

Shape letters: C channels, H W pixels. The arithmetic is Pillow's resize on 8-bit values (as torchvision and timm do
it), then `(value / full_range - mean) / std` in the requested precision.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image
from pydantic import Field, model_validator

from xaibatch.data.decode import DecodedImage
from xaibatch.errors import ImageError, ModelError
from xaibatch.options import Options

DEFAULT_CROP_FRACTION = 0.875
"""Side of the crop over the resized short side where a checkpoint's record says nothing (224 of 256), timm's default
too."""

FROM_TIMM = "timm configuration"
"""`Preprocessing.source` where the checkpoint records none."""

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


class Preprocessing(Options):
    """From a decoded image to the model's input; equal records give equal inputs."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width of the model's input in pixels: the centre crop."""

    resize_short: int | None = 256
    """Short side in pixels after the resize that comes before the crop; None: no resize, crop the original. For an
    input that is not square, the image is resized to cover a box of the input's proportions with this short side."""

    keep_aspect: bool = True
    """False: both sides are resized to the box (`squash`), whatever the image's proportions."""

    interpolation: Interpolation = "bilinear"
    """Pillow's filter, which low-passes when it shrinks."""

    crop_rounding: Literal["floor", "half_even"] = "floor"
    """Where an odd margin puts the crop: towards the upper left, or as torchvision and timm round (63.5 becomes 64)."""

    mean: tuple[float, ...] = (0.5,)
    """Per channel, or one for all, in units of the full range (0 to 1)."""

    std: tuple[float, ...] = (0.5,)
    """Per channel, or one for all, in units of the full range; positive."""

    channels: int = Field(default=3, ge=1)
    """Channels of the model's input."""

    grey: bool = False
    """Make colour images grey (ITU-R 601 luma) before repeating the channel; grey images are repeated in either
    case."""

    value_range: Literal["full", "min_max"] = "full"
    """What 0 and 1 stand for: the file's bit depth (0 to 255, 0 to 65535), or the image's own smallest and largest
    value. A twin is stretched by its image's values, so that both differ only where the films do; what lies beyond
    them saturates."""

    dicom_range: Literal["window", "full"] = "window"
    """DICOM only: the file's own first window or lookup table where it has one, or all its stored bits."""

    source: str = "default"
    """Where these values come from, for the run record: `checkpoint metadata`, `timm configuration`, ..."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if min(self.image_size) < 1:
            raise ValueError("image_size must be positive")
        if self.resize_short is not None and self.resize_short < min(self.image_size):
            raise ValueError(
                f"resize_short {self.resize_short} is smaller than the crop of {min(self.image_size)} pixels"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} values; expected 1 or one per channel ({self.channels})")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self

    def apply(
        self, decoded: DecodedImage, dtype: DTypeLike = np.float32, image_of_twin: DecodedImage | None = None
    ) -> NDArray[np.floating]:
        """Return the normalised image (C,H,W) in `dtype`; a twin's with the image that it is the twin of.

        Raises ImageError where it is smaller than the crop and not resized, and where twin and image have no common
        scale under `min_max` (one has a bit depth, the other is floating-point).
        """
        values = self._channels_wanted(decoded)
        values, full_range = self._ranged(values, decoded, image_of_twin or decoded)
        cropped = self._cropped(self._resized(values, self.interpolation, full_range))
        scaled_HWC = np.atleast_3d(cropped).astype(dtype) / np.asarray(full_range, dtype)
        normalised_HWC = (scaled_HWC - np.asarray(self.mean, dtype)) / np.asarray(self.std, dtype)
        if normalised_HWC.shape[2] not in (1, self.channels):
            raise ImageError(f"the image has {normalised_HWC.shape[2]} channels, the model takes {self.channels}")
        shape = (self.channels, *self.image_size)
        return np.ascontiguousarray(np.broadcast_to(normalised_HWC.transpose(2, 0, 1), shape))

    def apply_mask(self, mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the mask (H,W) bool under the image's own geometry, nearest neighbour. The mask has the image's
        proportions."""
        levels = mask_HW.astype(np.uint8) * 255
        return self._cropped(self._resized(levels, "nearest", 255)) > 0

    def resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width after the resize and before the crop, of an image of `size` (height, width).

        >>> Preprocessing(resize_short=256).resized_size((1000, 1500))
        (256, 384)
        """
        if self.resize_short is None:
            return size
        short = min(self.image_size)
        box = [self.resize_short * side // short for side in self.image_size]
        if not self.keep_aspect:
            return box[0], box[1]
        # The side that just covers the box is set exactly; the other is floored, as torchvision does.
        if size[0] * box[1] <= size[1] * box[0]:
            return box[0], max(box[0] * size[1] // size[0], box[1])
        return max(box[1] * size[0] // size[1], box[0]), box[1]

    def _channels_wanted(self, decoded: DecodedImage) -> NDArray:
        values = decoded.values
        if values.ndim == 2 or not (self.grey or self.channels == 1):
            return values
        if values.dtype == np.uint8:
            return np.asarray(Image.fromarray(values).convert("L"))
        return values @ np.asarray((0.299, 0.587, 0.114), np.float32)

    def _ranged(self, values: NDArray, decoded: DecodedImage, ranged_by: DecodedImage) -> tuple[NDArray, float]:
        if self.value_range == "min_max":
            if (decoded.full_range is None) != (ranged_by.full_range is None):
                raise ImageError("image and twin have no common scale: one is floating-point, the other is not")
            unit = (decoded.full_range or 1.0) / (ranged_by.full_range or 1.0)
            range_by = self._channels_wanted(ranged_by)
            low, high = float(range_by.min()) * unit, float(range_by.max()) * unit
            stretched = (values.astype(np.float32) - low) / ((high - low) or 1.0)
            return stretched.clip(0, 1).astype(np.float32), 1.0
        if decoded.full_range is None:
            raise ImageError(
                "a floating-point image has no full range: set value_range to 'min_max', or store it with 8 or 16 bits"
            )
        return values, decoded.full_range

    def _resized(self, values: NDArray, interpolation: Interpolation, full_range: float) -> NDArray:
        height, width = self.resized_size((values.shape[0], values.shape[1]))
        if values.shape[:2] == (height, width):
            return values
        resample = Image.Resampling[interpolation.upper()]
        if values.dtype == np.uint8:
            return np.asarray(Image.fromarray(values).resize((width, height), resample))
        planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(np.atleast_3d(values), 2, 0)]
        resized = np.stack([np.asarray(plane.resize((width, height), resample)) for plane in planes], axis=2)
        return resized.clip(0, full_range).reshape(height, width, *values.shape[2:])

    def _cropped(self, values: NDArray) -> NDArray:
        margins = [have - want for have, want in zip(values.shape[:2], self.image_size, strict=True)]
        if min(margins) < 0:
            have, want = (f"{height}x{width}" for height, width in (values.shape[:2], self.image_size))
            raise ImageError(f"the image of {have} pixels is smaller than the crop of {want}: set resize_short")
        top, left = (margin // 2 if self.crop_rounding == "floor" else round(margin / 2) for margin in margins)
        return values[top : top + self.image_size[0], left : left + self.image_size[1]]


def from_metadata(
    metadata: Mapping[str, Any], image_size: tuple[int, int], channels: int, source: str
) -> Preprocessing | None:
    """The preprocessing that a checkpoint records, None where it records none.

    `preprocessing` (a whole record as JSON text or a mapping) wins; else `mean` and `std` (numbers, lists, or text
    with commas), with `resize_short`, `crop_pct`, `interpolation`, `grey` where given. One mean for three channels
    says that the model was trained on grey images repeated. A crop that is not recorded is the customary 224 of 256.
    Raises ModelError for values that make no sense.
    """
    whole = metadata.get("preprocessing")
    if whole is not None:
        recorded = _checked(
            lambda: Preprocessing.model_validate_json(whole) if isinstance(whole, str) else Preprocessing(**whole)
        )
        return recorded.model_copy(update={"source": source})
    if "mean" not in metadata or "std" not in metadata:
        return None

    def build() -> Preprocessing:
        mean, std = _numbers(metadata["mean"]), _numbers(metadata["std"])
        crop_fraction = float(metadata.get("crop_pct") or DEFAULT_CROP_FRACTION)
        resize_short = metadata.get("resize_short")
        grey = metadata.get("grey")
        return Preprocessing(
            image_size=image_size,
            resize_short=int(resize_short) if resize_short else math.floor(min(image_size) / crop_fraction),
            interpolation=metadata.get("interpolation", "bilinear"),
            mean=mean,
            std=std,
            channels=channels,
            grey=len(mean) == 1 if grey is None else str(grey).lower() in ("1", "true", "yes"),
            source=source,
        )

    return _checked(build)


def from_timm(config: Mapping[str, Any], image_size: tuple[int, int], channels: int) -> Preprocessing:
    """The preprocessing of a timm data configuration (`timm.data.resolve_model_data_config`), equal to timm's own
    transform.

    Raises ModelError for the crop mode `border`, which no plain ViT of timm uses.
    """
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ModelError(f"timm's crop mode {mode!r} is not supported: give the preprocessing yourself")
    return _checked(
        lambda: Preprocessing(
            image_size=image_size,
            resize_short=math.floor(min(image_size) / (config.get("crop_pct") or DEFAULT_CROP_FRACTION)),
            keep_aspect=mode == "center",
            interpolation=config.get("interpolation", "bicubic"),
            crop_rounding="half_even",
            mean=_per_channel(config["mean"], channels),
            std=_per_channel(config["std"], channels),
            channels=channels,
            source=FROM_TIMM,
        )
    )


def _checked(build: Callable[[], Preprocessing]) -> Preprocessing:
    try:
        return build()
    except (ValueError, TypeError) as error:
        reasons = "; ".join(str(item["msg"]) for item in error.errors()) if hasattr(error, "errors") else str(error)
        raise ModelError(f"the checkpoint's preprocessing cannot be used: {reasons}") from None


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) in (1, channels) else (float(np.mean(values)),)


def _numbers(value: Any) -> tuple[float, ...]:
    if isinstance(value, str):
        value = value.strip("[]() ").split(",")
    return tuple(float(item) for item in (value if isinstance(value, Sequence) else (value,)))

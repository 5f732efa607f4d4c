"""A file's bytes in, grey or RGB pixels with their full range out; anything that is no usable image is an ImageError
in one line.

EXIF orientation is ignored, as torchvision's and timm's loaders ignore it, so that a model sees what it was trained
on. Transparency is dropped, not blended. Of a file with several frames the first is read. H W: pixels.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from xaibatch.data.storage import one_line
from xaibatch.errors import ImageError
from xaibatch.options import Options

FORMATS: Final = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG2000")
"""What Pillow may open. Formats that start another program (PostScript) are not among them."""

LABEL_MAP_LIMIT: Final = 32
"""A lossless 8-bit mask whose largest value is below this is read as a map of label numbers: inside is non-zero."""


JPEG_START: Final = b"\xff\xd8"


class ImageLimits(Options):
    """Sizes beyond which a file is refused before its pixels are decoded."""

    max_pixels: int = Field(default=100_000_000, gt=0)
    """Largest width times height. (Pillow itself refuses everything above 178,956,970.)"""

    min_side: int = Field(default=8, ge=1)
    """Smallest width and height in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedImage:
    """Pixels as the file has them.

    values:     uint8 (8-bit files) or float32 (16-bit and DICOM), (H,W) grey or (H,W,3) RGB; 0 is black.
    full_range: the value that stands for white: 255, 65535, 1 (DICOM, already scaled); None for floating-point files.
    """

    values: NDArray[np.uint8] | NDArray[np.float32]
    full_range: float | None


def decode_image(content: bytes, limits: ImageLimits | None = None, dicom_range: str = "window") -> DecodedImage:
    """Decode PNG, JPEG, TIFF, BMP, GIF, PNM, WebP, JPEG 2000, or DICOM (extra `dicom`). Warnings of the decoders stay
    inside.

    Raises ImageError for empty, truncated, foreign, tiny or huge files.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decode_in_quiet(content, limits or ImageLimits(), dicom_range)


def decode_in_quiet(content: bytes, limits: ImageLimits, dicom_range: str) -> DecodedImage:
    """`decode_image` where the caller has silenced warnings, for a whole shard or for all threads at once."""
    if not content:
        raise ImageError("the file is empty (0 bytes)")
    if is_dicom(content):
        from xaibatch.data.dicom import decode_dicom

        return decode_dicom(content, limits, dicom_range)
    with _opened(content, limits) as image:
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:
            raise ImageError(f"the {image.format} image is truncated or damaged: {one_line(error)}") from None
        return _pixels(image)


def decode_mask(content: bytes, limits: ImageLimits | None = None) -> NDArray[np.bool_]:
    """Return a mask file as bool (H,W): inside is above half of the full range, or any non-zero value in a map of
    label numbers.

    Raises ImageError as `decode_image` does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mask_in_quiet(content, limits or ImageLimits())


def mask_in_quiet(content: bytes, limits: ImageLimits) -> NDArray[np.bool_]:
    """`decode_mask` where the caller has silenced warnings."""
    decoded = decode_in_quiet(content, limits, "full")
    grey = decoded.values if decoded.values.ndim == 2 else decoded.values.max(axis=2)
    lossy = content[:2] == JPEG_START
    full_range = decoded.full_range or 1.0
    if not lossy and full_range > 1 and grey.max() < LABEL_MAP_LIMIT:
        return grey > 0
    return grey > full_range / 2


def is_dicom(content: bytes) -> bool:
    """True for the DICOM preamble, or a file without one that starts with group 2 or 8 (old exports)."""
    return content[128:132] == b"DICM" or content[:2] in (b"\x02\x00", b"\x08\x00")


def check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Raise ImageError for an image that is too small to explain or too large to decode safely."""
    if width * height > limits.max_pixels:
        raise ImageError(f"the image has {width}x{height} pixels, more than the limit of {limits.max_pixels:,}")
    if min(width, height) < limits.min_side:
        raise ImageError(f"the image has {width}x{height} pixels; each side needs at least {limits.min_side}")


def _opened(content: bytes, limits: ImageLimits) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"not an image that can be read ({', '.join(FORMATS)} or DICOM)") from None
    except Image.DecompressionBombError:
        raise ImageError(f"the image has more pixels than Pillow opens (limit here: {limits.max_pixels:,})") from None
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"the image's header is damaged: {one_line(error)}") from None
    check_size(*image.size, limits)
    return image


def _pixels(image: Image.Image) -> DecodedImage:
    mode = image.mode
    if mode.startswith("I;16"):
        return DecodedImage(values=np.asarray(image).astype(np.float32), full_range=65535.0)
    if mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("the image has 32-bit values: store it with 8 or 16 bits")
        return DecodedImage(values=values.astype(np.float32), full_range=65535.0)
    if mode == "F":
        values = np.asarray(image, np.float32)
        if not np.isfinite(values).all():
            raise ImageError("the floating-point image has values that are not finite")
        return DecodedImage(values=values, full_range=None)
    if mode == "P":
        # A palette may hold nothing but greys; either way its colours decide.
        rgb = np.asarray(image.convert("RGBA").convert("RGB"))
        grey = (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all()
        return DecodedImage(values=rgb[..., 0].copy() if grey else rgb, full_range=255.0)
    grey = mode in ("L", "LA", "La", "1")
    if mode == "LA":
        values = np.asarray(image)[..., 0]
    elif mode in ("RGBA", "RGBX"):
        values = np.asarray(image)[..., :3]
    else:
        values = np.asarray(image.convert("L" if grey else "RGB"))
    return DecodedImage(values=np.ascontiguousarray(values), full_range=255.0)

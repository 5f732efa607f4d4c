"""A DICOM file's bytes in, grey or RGB pixels out (extra `dicom`); of the header only what the pixels need is read.

Order of DICOM PS3.3: stored values, modality (rescale or lookup table, C.11.1), display window or lookup table
(C.11.2), then MONOCHROME1 is inverted so that 0 is black everywhere. Padding pixels become black. H W: pixels.
"""

import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from xaibatch.data.decode import DecodedImage, ImageLimits, check_size
from xaibatch.errors import DataError, ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

TAGS: Final = [
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
]
"""The only header fields that are parsed: none of them names or dates a person."""

DEFLATED: Final = (b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.8.1")
"""Transfer syntaxes whose size after inflation cannot be checked beforehand: a file that names one is not parsed."""

GREY: Final = ("MONOCHROME1", "MONOCHROME2")
COLOUR: Final = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")


def decode_dicom(content: bytes, limits: ImageLimits, dicom_range: str) -> DecodedImage:
    """Decode one frame of 8 to 16 bits.

    `dicom_range` is `window` (the file's first window or lookup table; all stored bits where it has none) or `full`.
    Grey and 16-bit colour come as float32 in [0, 1] (`full_range` 1), 8-bit colour as uint8. Raises ImageError for a
    file that is damaged, has several frames, an unknown photometric form, or a compression that no installed package
    decodes; DataError where pydicom is not installed.
    """
    try:
        import pydicom
    except ImportError:
        raise DataError("reading DICOM needs pydicom: pip install 'xaibatch[dicom]'") from None
    with _quiet_log():
        try:
            dataset = _parsed(pydicom, content)
            _check_header(dataset, limits)
            stored = _stored(dataset)
            return _grey(dataset, stored, dicom_range) if _form(dataset) in GREY else _colour(dataset, stored)
        except (ImageError, MemoryError):
            raise
        except Exception as error:
            # The decoder's own text may quote header fields, so only its kind is told.
            raise ImageError(f"the DICOM file is damaged or incomplete ({type(error).__name__})") from None


def _parsed(pydicom: Any, content: bytes) -> "Dataset":
    if any(uid in content for uid in DEFLATED):
        raise ImageError("the DICOM file is deflated: store it uncompressed or as JPEG 2000")
    has_preamble = content[128:132] == b"DICM"
    stream = io.BytesIO(content)
    dataset: Dataset = pydicom.dcmread(stream, force=not has_preamble, specific_tags=list(TAGS))
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    return dataset


def _form(dataset: "Dataset") -> str:
    return str(dataset.PhotometricInterpretation)


def _check_header(dataset: "Dataset", limits: ImageLimits) -> None:
    from pydicom.pixels.decoders.base import get_decoder

    if "PixelData" not in dataset:
        raise ImageError("the DICOM file holds no integer pixel data")
    if _form(dataset) not in (*GREY, *COLOUR):
        raise ImageError(
            f"photometric form {_form(dataset)!r} is not supported: expected {', '.join((*GREY, *COLOUR))}"
        )
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise ImageError(f"the DICOM file has {dataset.NumberOfFrames} frames: expected a single radiograph")
    if dataset.BitsAllocated not in (8, 16):
        raise ImageError(f"{dataset.BitsAllocated} bits a value are not supported: expected 8 or 16")
    check_size(int(dataset.Columns), int(dataset.Rows), limits)
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and not get_decoder(syntax).is_available:
        raise ImageError(f"no installed package decodes its compression ({syntax.name}): pip install python-gdcm")


def _stored(dataset: "Dataset") -> NDArray:
    """Stored values (H,W) or (H,W,3) without the bits that belong to no pixel."""
    from pydicom.pixels.utils import pixel_array

    # Values that do not start at bit 0 (retired, but seen) are shifted here; pydicom clears the bits above the others.
    shifted = dataset.HighBit != dataset.BitsStored - 1
    stored: NDArray = pixel_array(dataset, correct_unused_bits=not shifted)
    if shifted:
        above, surplus = dataset.BitsAllocated - 1 - dataset.HighBit, dataset.BitsAllocated - dataset.BitsStored
        stored = (stored << above) >> surplus
    return stored


def _grey(dataset: "Dataset", stored: NDArray, dicom_range: str) -> DecodedImage:
    values, low, high = _modality(dataset, stored)
    scaled = _displayed(dataset, values) if dicom_range == "window" else None
    if scaled is None:
        scaled = (values - low) / (high - low)
    if _form(dataset) == "MONOCHROME1":
        scaled = 1.0 - scaled
    scaled = np.where(_padding(dataset, stored), 0.0, scaled)
    return DecodedImage(values=scaled.astype(np.float32), full_range=1.0)


def _modality(dataset: "Dataset", stored: NDArray) -> tuple[NDArray[np.float64], float, float]:
    """Values after the modality step, with the ends of their full range."""
    tables = dataset.get("ModalityLUTSequence")
    if tables:
        entries, highest = _looked_up(dataset, tables[0], stored)
        return entries, 0.0, highest
    bits = int(dataset.BitsStored)
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)
    slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
    low, high = sorted(end * slope + intercept for end in ends)
    return stored.astype(np.float64) * slope + intercept, low, high


def _looked_up(dataset: "Dataset", table: "Dataset", values: NDArray) -> tuple[NDArray[np.float64], float]:
    """The table's entries for the values, and the largest entry that its bit depth allows (PS3.3 C.11.1.1.1,
    C.11.2.1.1).

    Values below the first one mapped take the first entry, values beyond the last one the last.
    """
    count, first, bits = (int(number) for number in table.LUTDescriptor)
    count = count or 1 << 16
    if dataset.PixelRepresentation and first >= 1 << 15:
        first -= 1 << 16
    entries = table.LUTData
    if isinstance(entries, bytes):
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        entries = np.frombuffer(entries, np.uint8 if len(entries) < 2 * count else f"{order}u2")
    index = np.rint(values).astype(np.int64) - first
    return np.asarray(entries, np.float64)[index.clip(0, count - 1)], float(2**bits - 1)


def _displayed(dataset: "Dataset", values: NDArray) -> NDArray[np.float64] | None:
    """Values after the file's first lookup table or else its first window, in [0, 1].

    None where it has neither, or a window whose width makes no sense.
    """
    tables = dataset.get("VOILUTSequence")
    if tables:
        entries, highest = _looked_up(dataset, tables[0], values)
        return (entries / highest).clip(0, 1)
    centres, widths = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if centres is None or widths is None:
        return None
    centre, width = (float(np.atleast_1d(np.asarray(number, np.float64))[0]) for number in (centres, widths))
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if not (math.isfinite(centre) and width > (0 if function != "LINEAR" else 1)):
        return None
    if function == "SIGMOID":
        return 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700)))
    if function == "LINEAR_EXACT":
        return ((values - centre) / width + 0.5).clip(0, 1)
    return ((values - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)


def _padding(dataset: "Dataset", stored: NDArray) -> NDArray[np.bool_]:
    """Pixels that the file declares as padding (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, np.bool_)
    ends = sorted((int(value), int(dataset.get("PixelPaddingRangeLimit", value))))
    wide = stored.astype(np.int64)
    return (wide >= ends[0]) & (wide <= ends[1])


def _colour(dataset: "Dataset", stored: NDArray) -> DecodedImage:
    from pydicom.pixels.processing import apply_color_lut

    form = _form(dataset)
    bits = int(dataset.BitsStored)
    if form == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        bits = stored.dtype.itemsize * 8
    if bits == 8 and stored.dtype == np.uint8:
        return DecodedImage(values=np.ascontiguousarray(stored), full_range=255.0)
    scaled = (stored / (2**bits - 1)).clip(0, 1).astype(np.float32)
    return DecodedImage(values=scaled, full_range=1.0)


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Keep pydicom's log lines, which may quote header fields, from every handler."""

    class Refuse(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return False

    refuse = Refuse()
    names = [name for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] == "pydicom"]
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(refuse)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(refuse)

"""DICOM: bit depths, photometric forms, windows, lookup tables, padding, damage, and that no header leaves the
reader."""

import io
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xaibatch.data.dataset import open_dataset
from xaibatch.data.decode import ImageLimits, decode_image
from xaibatch.data.load import load_shard
from xaibatch.data.preprocess import Preprocessing
from xaibatch.data.sampling import shards
from xaibatch.errors import DataError, ImageError

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_voi_lut  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

SECRET = "Doe^Jane"


def made(
    values: np.ndarray, bits: int = 16, form: str = "MONOCHROME2", syntax: str = ExplicitVRLittleEndian, **tags: Any
) -> Dataset:
    """A minimal radiograph of the given stored values."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = SECRET, "hospital-4711", "19700101"
    dataset.Rows, dataset.Columns = values.shape[:2]
    dataset.SamplesPerPixel = 3 if values.ndim == 3 else 1
    if values.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = form
    dataset.BitsAllocated = values.dtype.itemsize * 8
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(np.issubdtype(values.dtype, np.signedinteger))
    dataset.PixelData = values.tobytes()
    dataset["PixelData"].VR = "OB" if values.dtype.itemsize == 1 else "OW"
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def content_of(dataset: Dataset) -> bytes:
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def decoded(dataset: Dataset, how: str = "window") -> np.ndarray:
    image = decode_image(content_of(dataset), None, how)
    assert image.full_range == (255.0 if image.values.dtype == np.uint8 else 1.0)
    return image.values


def stored(bits: int, signed: bool = False, seed: int = 0) -> np.ndarray:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    kind = {False: np.uint16, True: np.int16}[signed] if bits > 8 else {False: np.uint8, True: np.int8}[signed]
    return np.random.default_rng(seed).integers(low, high, (20, 24)).astype(kind)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_all_stored_bits_span_black_to_white(bits: int, signed: bool) -> None:
    values = stored(bits, signed)
    lowest = -(2 ** (bits - 1)) if signed else 0
    expected = (values.astype(float) - lowest) / (2**bits - 1)
    np.testing.assert_allclose(decoded(made(values, bits)), expected, atol=1e-7)
    np.testing.assert_allclose(decoded(made(values, bits, "MONOCHROME1")), 1 - expected, atol=1e-7)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("window", [(2000, 1500), (700.5, 333.25), ([1000, 5], [800, 7])])
@pytest.mark.parametrize("slope", [(1, 0), (2, -1024), (0.5, 100)])
@pytest.mark.parametrize("signed", [False, True])
def test_windows_equal_pydicoms(function: str | None, window: tuple, slope: tuple[float, float], signed: bool) -> None:
    tags = {"WindowCenter": window[0], "WindowWidth": window[1], "RescaleSlope": slope[0], "RescaleIntercept": slope[1]}
    if function is not None:
        tags["VOILUTFunction"] = function
    dataset = made(stored(12, signed), 12, **tags)
    shown = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    # pydicom scales the window onto the range that the stored bits have after the rescale.
    ends = np.array((-2048, 2047) if signed else (0, 4095)) * slope[0] + slope[1]
    np.testing.assert_allclose(decoded(dataset), (shown - ends[0]) / (ends[1] - ends[0]), atol=1e-6)


def test_the_window_can_be_left_aside_and_a_senseless_one_is() -> None:
    values = stored(12)
    plain = decoded(made(values, 12))
    np.testing.assert_array_equal(decoded(made(values, 12, WindowCenter=100, WindowWidth=50), "full"), plain)
    np.testing.assert_array_equal(decoded(made(values, 12, WindowCenter=100, WindowWidth=0)), plain)


def test_a_negative_slope_turns_black_and_white() -> None:
    values = stored(12)
    turned = decoded(made(values, 12, RescaleSlope=-1, RescaleIntercept=4095))
    np.testing.assert_allclose(turned, 1 - decoded(made(values, 12)), atol=1e-7)


def table(values: np.ndarray, first: int, bits: int, packed: bool = False) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "OW", values.tobytes()) if packed else item.add_new("LUTData", "US", values.tolist())
    item.add_new("ModalityLUTType", "LO", "US")
    return [item]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [10, 16])
def test_lookup_tables_equal_their_definition(bits: int, packed: bool) -> None:
    values = stored(12)
    curve = (np.sqrt(np.arange(3000) / 2999) * (2**bits - 1)).astype(np.uint16)
    expected = curve[np.clip(values.astype(int) - 500, 0, 2999)] / (2**bits - 1)
    shown = made(values, 12, VOILUTSequence=table(curve, 500, bits, packed), WindowCenter=1, WindowWidth=2)
    np.testing.assert_allclose(decoded(shown), expected, atol=1e-7)
    np.testing.assert_allclose(
        decoded(made(values, 12, ModalityLUTSequence=table(curve, 500, bits, packed))), expected, atol=1e-7
    )


def test_padding_is_black_in_both_monochrome_forms() -> None:
    values = np.minimum(stored(12), 3900)
    values[:5] = 4000
    values[5:8] = 3990
    for form in ("MONOCHROME1", "MONOCHROME2"):
        shown = decoded(made(values, 12, form, PixelPaddingValue=4000, PixelPaddingRangeLimit=3990))
        assert (shown[:8] == 0).all()
        np.testing.assert_array_equal(shown[8:], decoded(made(values, 12, form))[8:])


def test_a_lookup_table_reaches_below_zero_for_signed_values() -> None:
    curve = np.arange(4096, dtype=np.uint16)
    dataset = made(stored(12, True), 12, VOILUTSequence=table(curve, 65536 - 2048, 12))
    np.testing.assert_allclose(decoded(dataset), (stored(12, True) + 2048.0) / 4095, atol=1e-7)


def test_bits_that_belong_to_no_pixel_are_cleared() -> None:
    values = stored(12)
    expected = decoded(made(values, 12))
    np.testing.assert_array_equal(decoded(made(values | np.uint16(0xF000), 12)), expected)
    np.testing.assert_array_equal(decoded(made((values << 4) | np.uint16(0xF), 12, HighBit=15)), expected)
    signed = stored(12, True)
    np.testing.assert_array_equal(decoded(made(signed & np.int16(0x0FFF), 12)), decoded(made(signed, 12)))


def test_colour_forms() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    np.testing.assert_array_equal(decoded(made(rgb, 8, "RGB")), rgb)
    planes = made(np.ascontiguousarray(rgb.transpose(2, 0, 1)).reshape(20, 24, 3), 8, "RGB", PlanarConfiguration=1)
    np.testing.assert_array_equal(decoded(planes), rgb)
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    back = np.asarray(Image.fromarray(ybr, "YCbCr").convert("RGB")).astype(int)
    assert np.abs(decoded(made(ybr, 8, "YBR_FULL")).astype(int) - back).max() <= 1
    sixteen = rgb.astype(np.uint16) * 257
    np.testing.assert_allclose(decoded(made(sixteen, 16, "RGB")), rgb / 255, atol=1e-7)


def test_palette_colour() -> None:
    values = stored(8)
    ramps = [np.roll(np.arange(256, dtype=np.uint16) * 257, shift) for shift in (0, 50, 100)]
    tags: dict[str, Any] = {}
    for name, ramp in zip(("Red", "Green", "Blue"), ramps, strict=True):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{name}PaletteColorLookupTableData"] = ramp.tobytes()
    expected = np.stack([ramp[values] for ramp in ramps], axis=2) / 65535
    np.testing.assert_allclose(decoded(made(values, 8, "PALETTE COLOR", **tags)), expected, atol=1e-7)


def test_compressed_files() -> None:
    values = stored(12)
    native = decoded(made(values, 12))
    packed = made(values, 12)
    packed.compress(RLELossless, generate_instance_uid=False)
    np.testing.assert_array_equal(decoded(packed), native)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
    wavelets = made(values, 12, syntax=JPEG2000Lossless)
    wavelets.PixelData = encapsulate([stream.getvalue()])
    np.testing.assert_array_equal(decoded(wavelets), native)


def test_a_file_without_preamble_is_read() -> None:
    values = stored(12)
    dataset = made(values, 12)
    stream = io.BytesIO()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.file_meta = FileMetaDataset()
    dataset.save_as(stream, implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert stream.getvalue()[128:132] != b"DICM"
    np.testing.assert_array_equal(decode_image(stream.getvalue()).values, decoded(made(values, 12)))


def frames() -> Dataset:
    return made(np.zeros((20, 24), np.uint16), 16, NumberOfFrames=7)


def without_pixels() -> Dataset:
    dataset = made(stored(12), 12)
    del dataset.PixelData
    return dataset


def short() -> Dataset:
    dataset = made(stored(12), 12)
    dataset.PixelData = dataset.PixelData[:100]
    return dataset


def jpeg_ls() -> Dataset:
    dataset = made(stored(12), 12, syntax=JPEGLSLossless)
    dataset.PixelData = encapsulate([b"\xff\xd8 nothing that any decoder knows"])
    return dataset


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (frames, "7 frames"),
        (without_pixels, "no integer pixel data"),
        (short, "damaged or incomplete"),
        (jpeg_ls, "pip install python-gdcm|damaged or incomplete"),
        (lambda: made(stored(12), 12, "HSV"), "photometric form 'HSV' is not supported"),
        (lambda: made(np.zeros((20, 24), np.uint32), 32), "32 bits a value"),
        (lambda: made(np.zeros((4, 24), np.uint16)), "24x4 pixels; each side needs at least 8"),
        (lambda: made(stored(12), 12, syntax=DeflatedExplicitVRLittleEndian), "deflated"),
        (lambda: made(stored(12), 12, Rows=60_000, Columns=60_000), "more than the limit"),
    ],
)
def test_what_cannot_be_read_gives_one_line_without_header_text(make: Callable[[], Dataset], message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        decode_image(content_of(make()))
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_limit_of_pixels_holds_for_dicom() -> None:
    with pytest.raises(ImageError, match="limit of 479"):
        decode_image(content_of(made(stored(12), 12)), ImageLimits(max_pixels=479))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_never_raise_anything_else(seed: int) -> None:
    generator = np.random.default_rng(seed)
    content = bytearray(content_of(made(stored(12), 12, WindowCenter=1000, WindowWidth=500)))
    for position in generator.integers(132, len(content) - 960, 6):
        content[position] = generator.integers(256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = decode_image(bytes(content[: generator.integers(200, len(content) + 200)]))
        except ImageError:
            return
    assert np.isfinite(image.values).all()


def test_no_header_value_reaches_logs_warnings_or_messages(caplog: pytest.LogCaptureFixture) -> None:
    dataset = made(stored(12), 12)
    content = content_of(dataset).replace(b"19700101", b"not-date")
    # A value that its type does not allow makes pydicom quote it in warnings and log lines.
    dataset.WindowCenter, dataset.WindowWidth = "1", "900"
    odd = content_of(dataset).replace(b"DS\x02\x001 ", b"DS\x02\x00?!")
    # Surplus bytes make it warn and log.
    surplus = content_of(made(stored(12), 12, PixelData=stored(12).tobytes() + bytes(64)))
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(content)
        decode_image(surplus)
        with pytest.raises(ImageError) as caught:
            decode_image(odd)
    assert "?!" not in str(caught.value)
    assert caplog.text == ""


def test_a_folder_of_dicom_files_loads_and_names_no_patient(tmp_path: Path) -> None:
    (tmp_path / "sick").mkdir()
    (tmp_path / "sick" / "1.dcm").write_bytes(content_of(made(stored(12), 12, "MONOCHROME1")))
    (tmp_path / "sick" / "2.dcm").write_bytes(content_of(short()))
    dataset = open_dataset(str(tmp_path))
    assert [record.patient for record in dataset.records] == [None, None]
    preprocessing = Preprocessing(image_size=(16, 16), resize_short=20, mean=(0.5,), std=(0.5,))
    batch, failures = load_shard(shards(dataset.records, 9)[0], preprocessing, ("sick",))
    assert batch.ids == ("sick/1.dcm",)
    expected = (1 - stored(12)[2:18, 4:20] / 4095 - 0.5) / 0.5
    np.testing.assert_allclose(batch.images_BCHW[0, 0], expected, atol=1e-6)
    assert [failure.image_id for failure in failures] == ["sick/2.dcm"]
    full = preprocessing.model_copy(update={"dicom_range": "full"})
    np.testing.assert_array_equal(
        load_shard(shards(dataset.records, 9)[0], full, ("sick",))[0].images_BCHW, batch.images_BCHW
    )


def test_without_pydicom_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    content = content_of(made(stored(12), 12))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"pip install 'xaibatch\[dicom\]'"):
        decode_image(content)

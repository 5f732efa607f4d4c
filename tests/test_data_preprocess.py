"""Preprocessing equals timm's and the golden inputs, whatever the bit depth, and its record survives."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.image_files import SMALL, encoded, records_of
from xaibatch.data.dataset import open_dataset
from xaibatch.data.decode import DecodedImage, decode_image
from xaibatch.data.load import load_shard
from xaibatch.data.preprocess import Preprocessing, from_metadata, from_timm
from xaibatch.errors import ImageError, ModelError
from xaibatch.types import Shard


def test_preprocessing_equals_the_golden_inputs_exactly(shared: Path) -> None:
    golden = np.load(shared / "golden" / "tiny_lrp.npz")
    known = records_of(open_dataset(str(shared / "data" / "cxr3"), split="test"))
    shard = Shard(index=0, records=tuple(known[str(path)] for path in golden["paths"]))
    # The published mean and standard deviation, rounded to four digits, are those of the golden inputs.
    rounded = Preprocessing(mean=(0.5509,), std=(0.2387,), grey=True)
    batch, failures = load_shard(shard, rounded, ("COVID-19", "Pneumonia", "Normal"))
    assert failures == ()
    np.testing.assert_array_equal(batch.images_BCHW, golden["x"])
    np.testing.assert_array_equal(batch.labels_B, golden["y_true"])


@pytest.mark.parametrize("size", [(256, 351), (301, 300), (64, 500), (1000, 999), (224, 224), (249, 248)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("crop", [("center", 0.9), ("squash", 0.875), ("center", 1.0)])
def test_preprocessing_equals_timms_transform(size: tuple[int, int], mode: str, crop: tuple[str, float]) -> None:
    from timm.data import create_transform

    config = {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": crop[1],
        "crop_mode": crop[0],
    }
    generator = np.random.default_rng(size)
    image = Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).convert(mode)
    expected = create_transform(**config)(image.convert("RGB")).numpy()
    ours = from_timm(config, (224, 224), 3).apply(decode_image(encoded(image)))
    np.testing.assert_array_equal(ours, expected)


def test_a_slow_rewrite_of_resize_and_crop_agrees() -> None:
    """Bilinear with Pillow's low-pass, from its definition: a triangle of twice the scale, per axis, in float64."""

    def weights(num_in: int, num_out: int) -> np.ndarray:
        scale = num_in / num_out
        support = max(scale, 1.0)
        matrix = np.zeros((num_out, num_in))
        for row in range(num_out):
            centre = (row + 0.5) * scale
            matrix[row] = np.maximum(0, 1 - np.abs(np.arange(num_in) + 0.5 - centre) / support)
        return matrix / matrix.sum(1, keepdims=True)

    values = np.random.default_rng(3).integers(0, 65536, (60, 90)).astype(np.float32)
    preprocessing = Preprocessing(image_size=(20, 20), resize_short=30, mean=(0.4,), std=(0.3,), channels=1)
    expected = weights(60, 30) @ values.astype(np.float64) @ weights(90, 45).T
    expected = (expected[5:25, 12:32] / 65535 - 0.4) / 0.3
    ours = preprocessing.apply(DecodedImage(values=values, full_range=65535.0), np.float64)
    np.testing.assert_allclose(ours[0], expected, atol=2e-6)


def test_eight_and_sixteen_bits_of_the_same_picture_agree() -> None:
    eight = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
    sixteen = eight.astype(np.uint16) * 257
    preprocessing = Preprocessing(image_size=(32, 32), resize_short=None, mean=(0.5,), std=(0.2,))
    one, two = (preprocessing.apply(decode_image(encoded(Image.fromarray(v))), np.float64) for v in (eight, sixteen))
    np.testing.assert_allclose(one, two, atol=1e-12)


def test_grey_and_colour_channels() -> None:
    rgb = np.random.default_rng(2).integers(0, 256, (16, 16, 3), np.uint8)
    decoded = DecodedImage(values=rgb, full_range=255.0)
    kept = SMALL.apply(decoded)
    np.testing.assert_allclose(kept, (rgb.transpose(2, 0, 1) / 255 - 0.5) / 0.25, atol=1e-6)
    grey = SMALL.model_copy(update={"grey": True}).apply(decoded)
    np.testing.assert_array_equal(grey[0], grey[1])
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey[0] * 0.25 + 0.5, luma / 255, atol=0.51 / 255)
    single = Preprocessing(image_size=(16, 16), resize_short=16, mean=(0.5,), std=(0.25,), channels=1)
    np.testing.assert_array_equal(single.apply(decoded), grey[:1])
    assert SMALL.apply(decoded, np.float64).dtype == np.float64


def test_min_max_range_and_floating_point_files() -> None:
    values = np.random.default_rng(2).normal(size=(16, 16)).astype(np.float32)
    decoded = decode_image(encoded(Image.fromarray(values), "TIFF"))
    with pytest.raises(ImageError, match="set value_range to 'min_max'"):
        SMALL.apply(decoded)
    scaled = SMALL.model_copy(update={"value_range": "min_max"}).apply(decoded)[0] * 0.25 + 0.5
    np.testing.assert_allclose(scaled, (values - values.min()) / (values.max() - values.min()), atol=1e-6)
    flat = DecodedImage(values=np.full((16, 16), 9, np.uint8), full_range=255.0)
    assert (SMALL.model_copy(update={"value_range": "min_max"}).apply(flat) == -2).all()


def test_an_image_smaller_than_the_crop_is_refused_without_resize() -> None:
    preprocessing = Preprocessing(image_size=(16, 16), resize_short=None)
    with pytest.raises(ImageError, match="10x20 pixels is smaller than the crop of 16x16"):
        preprocessing.apply(DecodedImage(values=np.zeros((10, 20), np.uint8), full_range=255.0))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(8, 200), width=st.integers(8, 200), short=st.integers(16, 40))
def test_a_mask_follows_its_image(height: int, width: int, short: int) -> None:
    """A bright rectangle, sampled without blur, and its mask land on the same pixels."""
    inside = np.zeros((height, width), bool)
    inside[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    preprocessing = Preprocessing(
        image_size=(16, 16), resize_short=short, interpolation="nearest", mean=(0.0,), std=(1.0,)
    )
    image = DecodedImage(values=inside.astype(np.uint8) * 255, full_range=255.0)
    np.testing.assert_array_equal(preprocessing.apply(image)[0] > 0.5, preprocessing.apply_mask(inside))


def test_preprocessing_survives_json_and_checks_itself() -> None:
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(1, 1, 1), resize_short=None)
    assert Preprocessing.model_validate_json(preprocessing.model_dump_json()) == preprocessing
    for wrong in ({"std": (0.0,)}, {"mean": (0.1, 0.2)}, {"resize_short": 100}, {"image_size": (0, 224)}, {"size": 3}):
        with pytest.raises(ValueError, match=r"positive|values; expected|smaller than the crop|Extra inputs"):
            Preprocessing(**wrong)


def test_preprocessing_from_metadata() -> None:
    found = from_metadata({"mean": "0.55", "std": "0.24"}, (224, 224), 3, "here")
    assert found == Preprocessing(mean=(0.55,), std=(0.24,), grey=True, resize_short=256, source="here")
    found = from_metadata(
        {"mean": [0.1, 0.2, 0.3], "std": "1,1,1", "crop_pct": 1, "interpolation": "bicubic"}, (96, 96), 3, ""
    )
    assert found is not None
    assert (found.grey, found.resize_short, found.interpolation, found.mean) == (False, 96, "bicubic", (0.1, 0.2, 0.3))
    whole = Preprocessing(mean=(0.3,), std=(0.2,), crop_rounding="half_even")
    assert from_metadata({"preprocessing": whole.model_dump_json(), "mean": "9"}, (1, 1), 3, "default") == whole
    assert from_metadata({"classes": "a,b"}, (224, 224), 3, "") is None
    for wrong in ({"mean": "x", "std": "1"}, {"mean": "1,2", "std": "1"}, {"preprocessing": "{}}"}):
        with pytest.raises(ModelError, match="preprocessing cannot be used"):
            from_metadata(wrong, (224, 224), 3, "")

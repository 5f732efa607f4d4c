"""Image files of every kind, masks and boxes in; pixels, or one clear line on what is wrong, out."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.image_files import bad_files, encoded, grey_image
from xaibatch.data.boxes import boxes_mask
from xaibatch.data.decode import ImageLimits, decode_image, decode_mask
from xaibatch.errors import ImageError


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_eight_bit_grey_is_kept(kind: str) -> None:
    decoded = decode_image(encoded(grey_image(), kind))
    np.testing.assert_array_equal(decoded.values, np.asarray(grey_image()))
    assert (decoded.values.dtype, decoded.full_range) == (np.uint8, 255.0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_kept_with_its_range(kind: str) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (12, 10), np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values), kind))
    np.testing.assert_array_equal(decoded.values, values.astype(np.float32))
    assert decoded.full_range == 65535.0


def test_colour_alpha_palette_and_one_bit_forms() -> None:
    rgb = np.random.default_rng(2).integers(0, 256, (12, 10, 3), np.uint8)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(rgb))).values, rgb)
    alpha = np.dstack([rgb, np.full((12, 10), 7, np.uint8)])
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(alpha))).values, rgb)
    grey_alpha = Image.merge("LA", (grey_image(), Image.new("L", (10, 12), 7)))
    np.testing.assert_array_equal(decode_image(encoded(grey_alpha)).values, np.asarray(grey_image()))
    bits = grey_image().point(lambda value: 255 * (value > 99)).convert("1")
    np.testing.assert_array_equal(decode_image(encoded(bits)).values, np.asarray(bits).astype(np.uint8) * 255)
    palette = Image.fromarray(rgb).quantize(16)
    np.testing.assert_array_equal(decode_image(encoded(palette)).values, np.asarray(palette.convert("RGB")))
    grey_palette = Image.fromarray(np.arange(120, dtype=np.uint8).reshape(12, 10), "P")
    grey_palette.putpalette([level for level in range(256) for _ in range(3)])
    np.testing.assert_array_equal(decode_image(encoded(grey_palette)).values, np.arange(120).reshape(12, 10))


def test_palette_with_transparency_raises_no_warning() -> None:
    palette = Image.fromarray(np.arange(120, dtype=np.uint8).reshape(12, 10), "P")
    palette.putpalette([level for level in range(256) for _ in range(3)])
    content = encoded(palette, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(content).values.shape == (12, 10)


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(grey_image(), "JPEG", exif=exif.tobytes())).values.shape == (12, 10)


@pytest.mark.parametrize("name", bad_files())
def test_what_is_no_image_gives_one_clear_line(name: str) -> None:
    content, message = bad_files()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=message) as caught:
            decode_image(content)
    assert "\n" not in str(caught.value)


def test_the_pixel_limit_is_an_argument() -> None:
    content = encoded(Image.new("L", (40, 30)))
    assert decode_image(content, ImageLimits(max_pixels=1200)).values.shape == (30, 40)
    with pytest.raises(ImageError, match="more than the limit of 1,199"):
        decode_image(content, ImageLimits(max_pixels=1199))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_never_raise_anything_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "PPM"]))
    content = bytearray(encoded(grey_image(), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            decoded = decode_image(bytes(content[:cut]))
        except ImageError:
            return
    assert min(decoded.values.shape[:2]) >= 8


def test_masks_of_every_form_mean_the_same() -> None:
    inside = np.zeros((12, 10), bool)
    inside[3:7, 2:8] = True
    for levels in (inside * 255, inside * 1, inside * 7):
        np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(levels.astype(np.uint8)))), inside)
    colour = Image.fromarray(np.dstack([inside * 200, inside * 0, inside * 0]).astype(np.uint8))
    np.testing.assert_array_equal(decode_mask(encoded(colour)), inside)
    np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(inside))), inside)
    np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(inside.astype(np.uint16) * 65535))), inside)
    # A nearly black JPEG is an empty mask, not a map of label numbers.
    assert not decode_mask(encoded(Image.fromarray(np.full((12, 10), 3, np.uint8)), "JPEG")).any()


def test_boxes_are_scaled_and_joined() -> None:
    text = "box:1024x1024:256,512,256,128;0,0,64,64"
    expected = np.zeros((16, 16), bool)
    expected[8:10, 4:8] = True
    expected[0, 0] = True
    np.testing.assert_array_equal(boxes_mask(text, (16, 16)), expected)
    for wrong in ("box:1x1", "box:8x8:1,2,3", "box:0x8:1,2,3,4", "box:8x8:1,2,0,4", "box:8x8:a,b,c,d", "box:"):
        with pytest.raises(ImageError, match="not a list of boxes"):
            boxes_mask(wrong, (8, 8))

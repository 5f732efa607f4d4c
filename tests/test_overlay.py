"""Overlays pixel by pixel: opacity, colour, upsampling, what cannot be shown, a mask's outline."""

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from xaibatch.maps import upsample
from xaibatch.results import overlay
from xaibatch.results.figures import svg


def test_opacity_and_colour_follow_the_value():
    image = np.full((4, 4), 0.5)
    grid = np.zeros((4, 4))
    grid[1, 2], grid[3, 3] = 1.0, 0.5
    rgb = overlay.composite(image, grid) / 255
    options = overlay.OverlayOptions()
    np.testing.assert_allclose(rgb[0, 0], 0.5, atol=0.003)
    for place, value in (((1, 2), 1.0), ((3, 3), 0.5)):
        opacity = options.max_opacity * value**options.opacity_power
        expected = 0.5 * (1 - opacity) + np.array(colormaps["plasma"](value)[:3]) * opacity
        np.testing.assert_allclose(rgb[place], expected, atol=0.003)


def test_signed_maps_show_both_signs_and_positive_ones_no_negative():
    image, grid = np.full((2, 2), 0.5), np.array([[1.0, -1.0], [0.0, 0.0]])
    signed = overlay.composite(image, grid, signed=True).astype(int)
    assert signed[0, 0, 0] > signed[0, 0, 2] + 50  # orange: for the class
    assert signed[0, 1, 2] > signed[0, 1, 0] + 50  # blue: against it
    positive = overlay.composite(image, grid, signed=False)
    assert (positive[0, 1] == positive[1, 1]).all()


def test_the_overlay_upsamples_as_the_metrics_do():
    draws = np.random.default_rng(0)
    grid = draws.random((7, 7))
    image = np.zeros((28, 28))
    blended = overlay.composite(image, grid, options=overlay.OverlayOptions(max_opacity=1.0, opacity_power=1e-9))
    value = upsample(grid / grid.max(), (28, 28), "bilinear")
    np.testing.assert_allclose(blended / 255, colormaps["plasma"](value)[..., :3], atol=0.003)


@pytest.mark.parametrize("grid", [np.zeros((3, 3)), np.full((3, 3), np.nan)])
def test_a_map_that_cannot_be_shown_leaves_the_radiograph_alone_and_is_named(grid, tmp_path):
    image = np.linspace(0, 1, 81).reshape(9, 9)
    rgb = overlay.composite(image, grid)
    assert (rgb == np.round(image * 255)[..., None].astype(np.uint8)).all()
    figure = overlay.overlay_figure(image, grid, title="Normal (p = 0.9)", subtitle="LIME")
    captions = [axes.get_title() for axes in figure.axes]
    assert any("zero everywhere" in text or "undefined" in text for text in captions)
    assert len(figure.axes) == 2  # and no colour bar


def test_an_overlay_file_says_class_probability_and_explainer(tmp_path):
    image, grid = np.random.default_rng(0).random((32, 32)), np.random.default_rng(1).normal(size=(4, 4))
    mask = np.zeros((32, 32), bool)
    mask[8:20, 8:20] = True
    for suffix in ("png", "pdf", "svg"):
        path = overlay.write_overlay(
            tmp_path / "deep" / f"a.{suffix}",
            image_HW=image,
            map_hw=grid,
            title="COVID-19 (p = 0.97)",
            subtitle="AttnLRP",
            mask_HW=mask,
        )
        assert path.stat().st_size > 3000
    figure = overlay.overlay_figure(image, grid, title="COVID-19 (p = 0.97)", subtitle="AttnLRP", mask_HW=mask)
    text = svg(figure)
    for expected in ("COVID-19 (p = 0.97)", "AttnLRP", "against", "mask outlined"):
        assert expected in text
    with Image.open(tmp_path / "deep" / "a.png") as picture:
        assert picture.size[0] > 800


def test_a_mask_s_outline_is_its_inner_edge():
    mask = np.zeros((9, 9), bool)
    mask[2:7, 2:7] = True
    drawn = overlay.outlined(np.zeros((9, 9, 3), np.uint8), mask)
    touched = drawn.any(-1)
    inner = np.zeros_like(mask)
    inner[3:6, 3:6] = True
    assert (touched == (mask & ~inner)).all()


def test_grey_comes_back_from_the_model_s_input():
    grey = np.random.default_rng(0).random((5, 5))
    normalised = (np.repeat(grey[None], 3, 0) - np.array([0.4, 0.5, 0.6])[:, None, None]) / 0.25
    np.testing.assert_allclose(overlay.grey_image(normalised, (0.4, 0.5, 0.6), (0.25,)), grey, atol=1e-12)

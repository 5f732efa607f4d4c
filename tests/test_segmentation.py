"""Superpixels equal the reference's and are dense; their options are checked."""

import subprocess
import sys

import numpy as np
import pytest

from xaibatch.errors import ConfigError, UnknownNameError
from xaibatch.perturb.segmentation import patch_grid, segment, segmentation_spec


def test_segments_equal_golden(golden_small):
    golden = np.load(golden_small / "small_lime.npz")
    images = np.load(golden_small / "small_lrp.npz")["x"]
    for i in golden["images"]:
        np.testing.assert_array_equal(segment(images[i], "quickshift"), golden[f"{i}_segments"])
        np.testing.assert_array_equal(segment(images[i].astype(np.float64), "quickshift"), golden[f"{i}_segments"])


def test_segments_of_radiographs_equal_golden(shared):
    golden = np.load(shared / "golden/tiny_lime.npz")
    images = np.load(shared / "golden/tiny_lrp.npz")["x"]
    i = golden["images"][0]
    np.testing.assert_array_equal(segment(images[i], "quickshift"), golden[f"{i}_segments"])


@pytest.mark.parametrize(
    ("name", "options"),
    [("quickshift", {}), ("slic", {"n_segments": 12}), ("felzenszwalb", {"min_size": 30}), ("grid", {})],
)
def test_superpixels_are_dense_and_start_at_zero(name, options):
    ramp = np.linspace(-2, 2, 40)
    image = np.stack([ramp[:, None] + 0.3 * ramp * sign for sign in (-1, 0, 1)])
    labels = segment(image, name, options, patch_size=16)
    assert labels.dtype == np.int32
    assert labels.shape == (40, 40)
    assert np.array_equal(np.unique(labels), np.arange(labels.max() + 1))
    spec = segmentation_spec(name, options)
    assert np.array_equal(labels, segment(image, spec, patch_size=16))


def test_grid_is_row_major_with_smaller_pieces_at_the_border():
    assert patch_grid((4, 5), patch_size=2).tolist() == [[0, 0, 1, 1, 2]] * 2 + [[3, 3, 4, 4, 5]] * 2


def test_a_worker_makes_superpixels_without_torch():
    code = """
import sys
import numpy as np
from xaibatch.perturb.segmentation import segment
image = np.random.default_rng(0).normal(size=(3, 16, 16))
assert segment(image, "quickshift").shape == segment(image, "grid", patch_size=4).shape == (16, 16)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_segmentation_options_and_names_are_checked():
    image = np.zeros((3, 8, 8))
    with pytest.raises(UnknownNameError, match="quickshift"):
        segment(image, "quickshit")
    with pytest.raises(ConfigError, match="n_segmants"):
        segment(image, "slic", {"n_segmants": 3})

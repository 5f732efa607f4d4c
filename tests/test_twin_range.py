"""An image and its twin differ only where the films do, also where each image is stretched to its own range.

Shape letters: C channels, H W pixels.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.metrics_oracle import Bench
from xaibatch.data.load import load_shard
from xaibatch.data.preprocess import Preprocessing
from xaibatch.metrics import METRICS
from xaibatch.types import Failure, ImageBatch, ImageRecord, Shard

LESION = np.zeros((64, 64), bool)
LESION[20:28, 32:40] = True

PLAIN = Preprocessing(image_size=(64, 64), resize_short=None, value_range="min_max", channels=1, mean=(0,), std=(1,))


def films() -> tuple[np.ndarray, np.ndarray]:
    """A film of 40 to 180 with a lesion 60 brighter, which stretches the range, and its twin."""
    twin = np.random.default_rng(0).integers(40, 181, (64, 64))
    return twin + 60 * LESION, twin


def loaded(
    folder: Path, image_HW: np.ndarray, twin_HW: np.ndarray, preprocessing: Preprocessing = PLAIN
) -> tuple[ImageBatch, tuple[Failure, ...]]:
    paths = {}
    for name, values in (("image", image_HW), ("twin", twin_HW)):
        paths[name] = str(folder / f"{name}.tiff")
        Image.fromarray(values).save(paths[name])
    record = ImageRecord(image_id="x", path=paths["image"], twin=paths["twin"])
    return load_shard(Shard(index=0, records=(record,)), preprocessing, (), with_twins=True)


@pytest.mark.parametrize("value_range", ["full", "min_max"])
def test_the_changed_region_is_the_lesion(tmp_path: Path, value_range: str) -> None:
    image_HW, twin_HW = (film.astype(np.uint8) for film in films())
    preprocessing = PLAIN.model_copy(update={"value_range": value_range, "channels": 3})
    batch, _ = loaded(tmp_path, image_HW, twin_HW, preprocessing)
    assert batch.twins_BCHW is not None
    bench = Bench(num=1)
    bench.x, bench.twins = batch.images_BCHW, batch.twins_BCHW
    region_HW = METRICS["counterfactual_mass"]().options.region(bench.view(0))
    np.testing.assert_array_equal(region_HW, LESION)


@pytest.mark.parametrize(("interpolation", "reach"), [("bilinear", 1), ("bicubic", 2)])
def test_a_resize_spreads_the_difference_by_its_filter_only(tmp_path: Path, interpolation: str, reach: int) -> None:
    """Half as large, the lesion is rows 10 to 13 and columns 16 to 19; a triangle of twice the scale reaches one pixel
    further, the cubic filter two."""
    image_HW, twin_HW = (film.astype(np.uint8) for film in films())
    half = PLAIN.model_copy(update={"image_size": (32, 32), "resize_short": 32, "interpolation": interpolation})
    batch, _ = loaded(tmp_path, image_HW, twin_HW, half)
    assert batch.twins_BCHW is not None
    rows, columns = (batch.images_BCHW != batch.twins_BCHW)[0, 0].nonzero()
    assert (rows.min(), rows.max()) == (10 - reach, 13 + reach)
    assert (columns.min(), columns.max()) == (16 - reach, 19 + reach)


def test_the_image_s_values_are_0_and_1_and_the_twin_saturates(tmp_path: Path) -> None:
    """(v - 40) / (240 - 40) for both; what is darker or brighter than anything in the image becomes 0 or 1."""
    image_HW = np.full((64, 64), 40, np.uint8)
    image_HW[:, 32:] = 240
    twin_HW = image_HW.copy()
    twin_HW[0, :3] = (90, 20, 255)
    batch, _ = loaded(tmp_path, image_HW, twin_HW)
    assert batch.twins_BCHW is not None
    assert (batch.images_BCHW.min(), batch.images_BCHW.max()) == (0, 1)
    np.testing.assert_allclose(batch.twins_BCHW[0, 0, 0, :4], [0.25, 0, 1, 0])
    np.testing.assert_array_equal(batch.twins_BCHW[0, 0, 1:], batch.images_BCHW[0, 0, 1:])


def test_a_twin_of_another_bit_depth_is_brought_to_the_image_s(tmp_path: Path) -> None:
    image_HW, twin_HW = films()
    eight, _ = loaded(tmp_path, image_HW.astype(np.uint8), twin_HW.astype(np.uint8))
    mixed, _ = loaded(tmp_path, image_HW.astype(np.uint8), (twin_HW * 257).astype(np.uint16))
    assert eight.twins_BCHW is not None
    assert mixed.twins_BCHW is not None
    np.testing.assert_allclose(mixed.twins_BCHW, eight.twins_BCHW, atol=1e-6)


def test_a_floating_point_twin_of_an_eight_bit_image_is_no_twin(tmp_path: Path) -> None:
    image_HW, twin_HW = films()
    batch, (failure,) = loaded(tmp_path, image_HW.astype(np.uint8), twin_HW.astype(np.float32))
    assert batch.ids == ("x",)
    assert batch.twins_BCHW is not None
    assert np.isnan(batch.twins_BCHW).all()
    assert (failure.stage, failure.message) == (
        "twin",
        "twin: image and twin have no common scale: one is floating-point, the other is not",
    )
    both, failures = loaded(tmp_path, image_HW.astype(np.float32), twin_HW.astype(np.float32))
    assert failures == ()
    assert both.twins_BCHW is not None
    np.testing.assert_array_equal((both.images_BCHW != both.twins_BCHW)[0, 0], LESION)

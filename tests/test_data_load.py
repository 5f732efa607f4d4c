"""Shards: one bad image is one failure, masks and twins follow the image, order and threads change nothing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.image_files import SMALL, bad_files, image_folder, write_grey
from xaibatch.data.dataset import open_dataset
from xaibatch.data.decode import decode_image
from xaibatch.data.load import load_shard, resized_mask
from xaibatch.data.sampling import shards
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord, Shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "set")


def test_one_bad_image_is_one_failure_and_the_rest_is_loaded(folder: Path) -> None:
    whole = load_shard(shards(open_dataset(str(folder)).records, 9)[0], SMALL, ("a", "b"))[0]
    for name, (content, _) in bad_files().items():
        (folder / "a" / f"bad {name}.png").write_bytes(content)
    dataset = open_dataset(str(folder))
    records = (*dataset.records, ImageRecord(image_id="z/gone.png", path=str(folder / "gone.png"), label="b"))
    batch, failures = load_shard(Shard(index=0, records=records), SMALL, ("a", "b"))
    assert batch.ids == whole.ids
    np.testing.assert_array_equal(batch.images_BCHW, whole.images_BCHW)
    np.testing.assert_array_equal(batch.labels_B, [0, 0, 1, 1])
    assert {failure.image_id for failure in failures} == {f"a/bad {name}.png" for name in bad_files()} | {"z/gone.png"}
    assert {failure.stage for failure in failures} == {"read"}
    assert failures[-1].message == "the file does not exist"
    assert all("\n" not in failure.message and str(folder) not in failure.message for failure in failures)


def test_a_shard_without_any_readable_image_is_an_empty_batch() -> None:
    shard = Shard(index=0, records=(ImageRecord(image_id="x", path="/does/not/exist"),))
    batch, failures = load_shard(shard, SMALL, ("a",), with_masks=True, with_twins=True)
    assert batch.images_BCHW.shape == (0, 3, 16, 16)
    assert (len(batch), len(failures), batch.twins_BCHW) == (0, 1, None)


def test_masks_and_twins_follow_the_image(tmp_path: Path) -> None:
    inside = np.zeros((32, 48), bool)
    inside[8:20, 20:40] = True
    Image.fromarray(inside.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    Image.fromarray(inside.repeat(2, 0).repeat(2, 1)).save(tmp_path / "large.png")
    Image.fromarray(inside.T.copy()).save(tmp_path / "turned.png")
    image, twin = (
        str(write_grey(tmp_path / f"{name}.png", seed, (32, 48))) for seed, name in enumerate(("image", "twin"))
    )
    small = str(write_grey(tmp_path / "small.png"))
    masks = [
        {"lesion": str(tmp_path / "mask.png"), "lung": str(tmp_path / "large.png")},
        {"lesion": "box:48x32:20,8,20,12"},
        {"lesion": str(tmp_path / "turned.png"), "lung": small},
        {},
    ]
    twins = [twin, None, small, str(tmp_path / "gone.png")]
    records = tuple(
        ImageRecord(image_id=str(i), path=image, masks=mask, twin=other)
        for i, (mask, other) in enumerate(zip(masks, twins, strict=True))
    )
    batch, failures = load_shard(Shard(index=0, records=records), SMALL, (), with_masks=True, with_twins=True)
    expected = SMALL.apply_mask(inside)
    assert expected.sum() == 6 * 10
    for name, row in (("lesion", 0), ("lung", 0), ("lesion", 1)):
        np.testing.assert_array_equal(batch.masks[name][row], expected)
    assert batch.has_mask["lesion"].tolist() == [True, True, False, False]
    assert batch.has_mask["lung"].tolist() == [True, False, False, False]
    assert batch.twins_BCHW is not None
    assert np.isnan(batch.twins_BCHW).all((1, 2, 3)).tolist() == [False, True, True, True]
    np.testing.assert_array_equal(batch.twins_BCHW[0], SMALL.apply(decode_image(Path(twin).read_bytes())))
    assert [(f.image_id, f.stage) for f in failures] == [("2", "mask"), ("2", "mask"), ("2", "twin"), ("3", "twin")]
    assert "48x32 has other proportions than the image's 32x48" in failures[0].message
    plain = load_shard(Shard(index=0, records=records), SMALL, ())
    assert (plain[0].masks, plain[0].twins_BCHW, plain[1]) == ({}, None, ())


def test_resized_mask_is_nearest() -> None:
    mask = np.random.default_rng(0).random((6, 9)) > 0.5
    np.testing.assert_array_equal(resized_mask(mask, (12, 18)), mask.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(resized_mask(mask, (2, 3)), mask[1::3, 1::3])


def test_order_and_cut_do_not_change_an_image(folder: Path) -> None:
    records = open_dataset(str(folder)).records
    (folder / "a" / "3.png").write_bytes(b"")
    together, failures = load_shard(Shard(index=0, records=records[::-1]), SMALL, ("a", "b"))
    assert [failure.image_id for failure in failures] == ["a/3.png"]
    for row, image_id in enumerate(together.ids):
        record = next(record for record in records if record.image_id == image_id)
        alone, _ = load_shard(Shard(index=7, records=(record,)), SMALL, ("a", "b"))
        np.testing.assert_array_equal(alone.images_BCHW[0], together.images_BCHW[row])


def test_a_label_the_model_does_not_have_stops_the_run(folder: Path) -> None:
    with pytest.raises(DataError, match=r"'b'. Labels of the data: 'a', 'b'; classes of the model: 'a', 'c'"):
        load_shard(shards(open_dataset(str(folder)).records, 9)[0], SMALL, ("a", "c"))


def test_loading_needs_no_torch_and_no_pandas() -> None:
    code = (
        "import sys, xaibatch.data.load, xaibatch.data.dataset, xaibatch.data.sampling;"
        "print({'torch', 'timm', 'pandas', 'pydicom', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

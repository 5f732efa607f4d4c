"""Numbers of a classifier against scikit-learn; splits, stored images and augmentation."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score

from tests.toy_training import make_toy, options, rng
from xaibatch.data.dataset import open_dataset
from xaibatch.errors import DataError
from xaibatch.training import metrics
from xaibatch.training.augment import augmented, centre_crop
from xaibatch.training.images import ImageStore
from xaibatch.training.options import AugmentationOptions
from xaibatch.training.splits import class_weights, splits_of


@pytest.fixture
def toy(tmp_path):
    """60 noisy squares, bright in the upper left for class b; patients and splits in a manifest."""
    return make_toy(tmp_path / "toy")


# -- numbers of a classifier


def test_metrics_equal_scikit_learn():
    draws = rng(3)
    logits = draws.normal(size=(200, 3)).round(1)  # rounding makes ties
    labels = draws.integers(0, 3, 200)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = metrics.describe(probabilities, labels, ("x", "y", "z"))
    predicted = probabilities.argmax(1)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found["confusion"] == confusion_matrix(labels, predicted).tolist()
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"))
    for k, row in enumerate(found["per_class"].values()):
        assert row["auroc"] == pytest.approx(roc_auc_score(labels == k, probabilities[:, k]))


def test_calibration_by_hand():
    # Two images at 0.95 (one right), two at 0.65 (both right): |0.5 - 0.95| and |1 - 0.65|, half each.
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.65, 0.35]])
    labels = np.array([0, 1, 0, 0])
    found = metrics.expected_calibration_error(probabilities, labels, metrics.CalibrationOptions(num_bins=10))
    assert found == pytest.approx(0.5 * 0.45 + 0.5 * 0.35)


def test_a_class_without_images_is_missing_not_zero():
    found = metrics.describe(np.array([[0.9, 0.05, 0.05], [0.2, 0.7, 0.1]]), np.array([0, 1]), ("x", "y", "z"))
    assert found["per_class"]["z"]["recall"] is None
    assert found["per_class"]["z"]["auroc"] is None
    assert found["balanced_accuracy"] == 1.0


def test_class_weights_make_classes_count_the_same():
    labels = np.repeat([0, 1, 2], [10, 30, 60])
    weights = class_weights(labels, 3)
    np.testing.assert_allclose([10 * weights[0], 30 * weights[1]], 60 * weights[2])
    assert weights[labels].mean() == pytest.approx(1)


# -- data and augmentation


def test_leakage_is_named(tmp_path):
    leaky = make_toy(tmp_path / "leaky", leak=True)
    with pytest.raises(DataError, match=r"1 patient is in more than one split \('p0' in train and val\)"):
        splits_of(open_dataset(str(leaky)))


def test_missing_splits_are_named(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    (folder / "manifest.csv").write_text("path,label\na.png,x\n")
    with pytest.raises(DataError, match="no labelled images of split train and val"):
        splits_of(open_dataset(str(folder)))


def test_training_says_what_was_said_of_the_data(toy):
    (toy / "simulation.json").write_text("{}")
    manifest = (toy / "manifest.csv").read_text().replace("train,p0\n", "train,\n")
    (toy / "manifest.csv").write_text(manifest)
    assert splits_of(open_dataset(str(toy))).notes == (
        "the images are simulated: synthetic, not for clinical use",
        "1 images name no patient: that splits share no patient is not checked for them",
    )


def test_augmentation_without_changes_is_the_centre_crop():
    still = AugmentationOptions(
        zoom=(1, 1), stretch=0, rotation_degrees=0, shift=0, brightness=0, contrast=(1, 1), gamma=(1, 1), noise=0,
        erase_probability=0,
    )  # fmt: skip
    images = torch.from_numpy(rng().integers(0, 256, (2, 40, 40), dtype=np.uint8))
    found = augmented(images, ["a", "b"], still, size=32, seed=0, epoch=1)
    torch.testing.assert_close(found, centre_crop(images, 32), atol=1e-5, rtol=0)


def test_augmentation_hangs_on_id_and_epoch_not_on_the_batch():
    images = torch.from_numpy(rng().integers(0, 256, (3, 40, 40), dtype=np.uint8))
    settings = AugmentationOptions()
    together = augmented(images, ["a", "b", "c"], settings, size=32, seed=4, epoch=2)
    alone = augmented(images[1:2], ["b"], settings, size=32, seed=4, epoch=2)
    torch.testing.assert_close(together[1:2], alone)
    later = augmented(images[1:2], ["b"], settings, size=32, seed=4, epoch=3)
    assert (later - alone).abs().mean() > 0.01
    assert together.min() >= 0
    assert together.max() <= 1


def test_stored_images_equal_the_evaluation_preprocessing(toy, tmp_path):
    from xaibatch.data.load import load_shard
    from xaibatch.types import Shard

    splits = splits_of(open_dataset(str(toy)))
    store = ImageStore(splits.val, splits.class_names, side=36, cache_bytes=0)
    mean, std = store.mean_and_std()
    run = options(toy, tmp_path)
    from xaibatch.data.preprocess import Preprocessing

    view = Preprocessing(image_size=(32, 32), resize_short=run.resize_short, mean=(mean,), std=(std,), grey=True)
    batch, _ = load_shard(Shard(index=0, records=splits.val), view, splits.class_names)
    mine = (centre_crop(store.images(range(len(store))), 32) - mean) / std
    np.testing.assert_allclose(mine.expand(-1, 3, -1, -1).numpy(), batch.images_BCHW, atol=1e-5)
    np.testing.assert_array_equal(store.labels_N, batch.labels_B)

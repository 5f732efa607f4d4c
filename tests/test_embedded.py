"""The embedded radiographs and their classifier as shipped: truth, determinism of the files, accuracy, twins."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from scipy import ndimage

from xaibatch.data.dataset import open_dataset
from xaibatch.data.load import load_shard
from xaibatch.embedded import MODEL_NAME, manifest_path, model_path
from xaibatch.models.load import load_model
from xaibatch.simulate.options import CLASSES, NORMAL, SimulationOptions
from xaibatch.training import shipped
from xaibatch.types import Shard


def rows():
    with manifest_path().open() as file:
        return list(csv.DictReader(file))


def grey(relative):
    with Image.open(manifest_path().parent / relative) as image:
        return np.asarray(image.convert("L")).astype(int)


@pytest.fixture(scope="module")
def classified():
    """Records, and the classifier's logits (N,3) of films and of twins (of normal films: themselves)."""
    records = open_dataset(str(manifest_path())).records
    model = load_model(MODEL_NAME, checkpoint=str(model_path()))
    batch, failures = load_shard(
        Shard(index=0, records=records), model.preprocessing, model.class_names, with_twins=True
    )
    assert not failures
    twins = np.where(np.isnan(batch.twins_BCHW), batch.images_BCHW, batch.twins_BCHW)
    with torch.inference_mode():
        films, healthy = (model(torch.from_numpy(images.astype(np.float32))) for images in (batch.images_BCHW, twins))
    return records, batch, films, healthy


def test_sixteen_of_each_class_with_masks_and_twins():
    found = rows()
    assert [sum(row["label"] == name for row in found) for name in CLASSES] == [16, 16, 16]
    assert len({row["patient"] for row in found}) == 48
    for row in found:
        assert grey(row["path"]).shape == (224, 224)
        assert bool(row["twin"]) == bool(row["mask_lesion"]) == (row["label"] != NORMAL)
        lung = grey(row["mask_lung"]) > 0
        assert 0.3 < lung.mean() < 0.65


def test_lesion_masks_agree_with_film_minus_twin():
    for row in rows():
        if not row["twin"]:
            continue
        difference = np.abs(grey(row["path"]) - grey(row["twin"]))
        mask, lung = grey(row["mask_lesion"]) > 0, grey(row["mask_lung"]) > 0
        assert 0.03 < mask.mean() < 0.2
        assert (mask & lung).sum() > 0.99 * mask.sum()
        # Independent of how the mask was made: it holds most of what differs, and hardly a pixel of it looks the same.
        assert difference[mask].sum() > 0.7 * difference.sum()
        assert (ndimage.gaussian_filter(difference.astype(float), 1)[mask] > 4).mean() > 0.9
        away = ~ndimage.binary_dilation(mask, iterations=12)
        assert difference[away].mean() < 0.1 * difference[mask].mean()


def test_classes_look_as_they_are_called():
    for row in rows():
        if row["label"] == NORMAL:
            continue
        mask = grey(row["mask_lesion"]) > 0
        halves = sorted([mask[:, :112].sum() / mask.sum(), mask[:, 112:].sum() / mask.sum()])
        parts, _ = ndimage.label(mask)
        largest = np.bincount(parts[parts > 0]).max() / mask.sum()
        if row["label"] == "COVID-like":
            assert halves[0] > 0.1  # both lungs
        else:
            assert largest > 0.9  # one patch


def test_set_is_what_its_record_says():
    record = json.loads((manifest_path().parent / "simulation.json").read_text())
    assert record["seed"] == shipped.EMBEDDED_SEED
    options = SimulationOptions.model_validate(record["options"])
    assert options == SimulationOptions(split_shares={"test": 1.0})
    assert shipped.EMBEDDED_SEED not in (shipped.TRAIN_SEED, shipped.HELD_OUT_SEED)


def test_sizes_fit_the_package():
    folder = manifest_path().parent
    assert sum(path.stat().st_size for path in folder.rglob("*.png")) < 4e6
    assert model_path().stat().st_size < 12e6


def test_people_read_that_it_is_synthetic():
    words = "not for clinical use"
    assert words in (manifest_path().parent / "NOTICE.txt").read_text()
    assert words in (manifest_path().parents[1] / "README.md").read_text()
    with safe_open(model_path(), "pt") as file:
        assert words in file.metadata()["notice"]


def test_classifier_carries_classes_and_preprocessing():
    model = load_model(MODEL_NAME, checkpoint=str(model_path()))
    assert model.class_names == CLASSES
    assert model.preprocessing.image_size == (224, 224)
    assert model.preprocessing.resize_short == 224  # the films are taken as they are
    assert model.preprocessing.mean == (shipped.MEAN,)
    with safe_open(model_path(), "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_classifier_is_accurate_on_the_embedded_films(classified):
    _, batch, films, _ = classified
    right = films.argmax(1).numpy() == batch.labels_B
    assert right.mean() >= 0.9
    for k in range(3):
        assert right[batch.labels_B == k].mean() >= 0.8


def test_without_the_lesion_the_classifier_says_normal(classified):
    _, batch, films, healthy = classified
    found = (films.argmax(1).numpy() == batch.labels_B) & (batch.labels_B != CLASSES.index(NORMAL))
    answers = healthy.argmax(1).numpy()[found]
    assert found.sum() >= 27
    assert (answers == CLASSES.index(NORMAL)).mean() >= 0.9


def test_record_states_the_held_out_accuracy():
    record = json.loads(model_path().with_suffix(".record.json").read_text())
    held_out = record["held_out"]
    assert held_out["num_films"] == 240
    assert held_out["accuracy"] >= 0.9
    assert min(held_out["recall"].values()) >= 0.8
    assert record["deviation"] == shipped.DEVIATION  # it is not the training job's loop, and says so
    confusion = np.array(record["detail"]["confusion"])
    assert np.trace(confusion) / confusion.sum() == pytest.approx(held_out["accuracy"])

"""Training: arithmetic against SciPy, scikit-learn and slow rewrites; runs against themselves after a kill."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score
from torch.nn import functional

from xaibatch.data.dataset import open_dataset
from xaibatch.errors import ConfigError, DataError, ModelError, RunFolderError, UnknownNameError
from xaibatch.models.load import load_model
from xaibatch.training import metrics
from xaibatch.training.alone import train_alone
from xaibatch.training.augment import augmented, centre_crop
from xaibatch.training.fit import Place, fit
from xaibatch.training.images import ImageStore
from xaibatch.training.model import Averaged, starting_model, with_kept_patches
from xaibatch.training.options import AugmentationOptions, TrainOptions
from xaibatch.training.splits import class_weights, splits_of
from xaibatch.training.twin_training import TwinTrainer
from xaibatch.training.twins import (
    BagHead,
    TwinRecipe,
    contrasted,
    forward_kept,
    kept_patches,
    same_pose_augmented,
    within_pose_loss,
)

TINY = "test_vit"
"""timm's ViT for tests: 0.4 million weights at 160 pixels."""


def rng(seed=0):
    return np.random.Generator(np.random.Philox(key=seed))


@pytest.fixture
def toy(tmp_path):
    """60 noisy squares, bright in the upper left for class b; patients and splits in a manifest."""
    return make_toy(tmp_path / "toy")


def make_toy(folder, leak=False):
    folder.mkdir()
    lines = ["path,label,split,patient"]
    draws = rng(1)
    for i in range(60):
        label = "ab"[i % 2]
        pixels = draws.normal(100, 20, (40, 44))
        pixels[6:20, 6:20] += 80 * (label == "b")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"i{i:02d}.png")
        split = ("train", "train", "train", "val", "test")[i % 5]
        patient = "p0" if leak and i in (0, 3) else f"p{i}"
        lines.append(f"i{i:02d}.png,{label},{split},{patient}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def options(toy, tmp_path, **changes):
    small = {
        "data": str(toy), "output": str(tmp_path / "run"), "model": TINY, "image_size": 32, "resize_short": 36,
        "epochs": 3, "warmup_epochs": 1.0, "batch_size": 12, "learning_rate": 2e-3, "average_decay": 0.8,
        "use_gpu": False, "precision": "float32",
    }  # fmt: skip
    return TrainOptions(**{**small, **changes})


# --- numbers of a classifier -------------------------------------------------------------------------------------


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


# --- data and augmentation ---------------------------------------------------------------------------------------


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


# --- runs --------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def test_a_killed_run_ends_as_if_it_had_not_been_killed(toy, tmp_path):
    whole, broken = options(toy, tmp_path), options(toy, tmp_path, output=str(tmp_path / "broken"))
    fit(whole, Place(), report=lambda _: None)

    def kill(row):
        if row["epoch"] == 2:
            raise KilledError

    with pytest.raises(KilledError):
        fit(broken, Place(), report=kill)
    lines = []
    fit(broken, Place(), report=lambda _: None, say=lines.append)
    assert any("resuming after epoch 2 of 3" in line for line in lines)
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("run", "broken")]
    for name, value in states[0]["averaged"].items():
        torch.testing.assert_close(states[1]["averaged"][name], value, rtol=0, atol=0)
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "broken"))
    assert a == b
    with pytest.raises(RunFolderError, match=r"learning_rate was 0\.002, now 0\.001"):
        fit(options(toy, tmp_path, learning_rate=1e-3), Place(), report=lambda _: None)


def test_a_run_learns_and_leaves_what_the_evaluation_takes(toy, tmp_path):
    run = options(toy, tmp_path, epochs=8)
    train_alone(run)
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["test"]["balanced_accuracy"] >= 0.9
    assert results["val"]["num_images"] == 12
    with Image.open(tmp_path / "run" / "learning_curve.png") as picture:
        assert picture.size[0] > 500
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    model = load_model(TINY, checkpoint=str(tmp_path / "run" / "model.safetensors"))
    assert model.class_names == ("a", "b")
    assert model.preprocessing.image_size == (32, 32)
    assert model.preprocessing.resize_short == 36
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert {"classes", "mean", "std", "input_size", "preprocessing", "options"} <= set(file.metadata())
    # The evaluation's own reader and loader reach the recorded accuracy.
    from xaibatch.data.load import load_shard
    from xaibatch.types import Shard

    records = open_dataset(str(toy), split="test").records
    batch, _ = load_shard(Shard(index=0, records=records), model.preprocessing, model.class_names)
    logits = model(torch.from_numpy(batch.images_BCHW))
    assert (logits.argmax(1).numpy() == batch.labels_B).mean() == pytest.approx(results["test"]["accuracy"])


def test_patience_and_clock_end_a_run(toy, tmp_path):
    train_alone(options(toy, tmp_path, epochs=30, learning_rate=1e-9, warmup_epochs=0, patience=2))
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 3
    other = options(toy, tmp_path, output=str(tmp_path / "clock"), epochs=30, max_minutes=1e-4)
    train_alone(other)
    assert len((tmp_path / "clock" / "history.jsonl").read_text().splitlines()) == 1


def test_start_weights_come_from_a_file_and_the_head_anew(toy, tmp_path):
    train_alone(options(toy, tmp_path, epochs=1))
    path = str(tmp_path / "run" / "model.safetensors")
    again = options(toy, tmp_path, checkpoint=path, output=str(tmp_path / "next"))
    model, words = starting_model(again, ("x", "y", "z"))
    assert "head.bias, head.weight anew" in words
    with safe_open(path, "pt") as file:
        torch.testing.assert_close(model.state_dict()["cls_token"], file.get_tensor("cls_token"))
    with pytest.raises(ModelError, match="does not fit"):
        starting_model(options(toy, tmp_path, model="vit_tiny_patch16_224", checkpoint=path), ("x", "y"))
    with pytest.raises(UnknownNameError):
        starting_model(options(toy, tmp_path, model="vit_tiny_patch61"), ("x", "y"))


def test_patch_dropping_keeps_the_class_token_and_ends_with_the_context(toy, tmp_path):
    model, _ = starting_model(options(toy, tmp_path, drop_path=0.0), ("x", "y"))
    seen = []
    model.blocks[0].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[1]))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.train()
    num_patches = model.patch_embed.num_patches
    with with_kept_patches(model, 0.5):
        model(images)
    model(images)
    assert seen == [model.num_prefix_tokens + round(num_patches / 2), model.num_prefix_tokens + num_patches]


def test_averaged_weights_by_hand():
    layer = torch.nn.Linear(1, 1, bias=False)
    averaged = Averaged(layer, decay=0.5)
    expected = layer.weight.item()
    for step in range(1, 6):
        layer.weight.data.fill_(float(step))
        averaged.update(layer)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert averaged.model.weight.item() == pytest.approx(expected, rel=1e-6)


def test_flags_and_files_become_options(tmp_path):
    from xaibatch.cli.train import options_from

    file = tmp_path / "train.yaml"
    file.write_text("data: here\noutput: there\nepochs: 5\n")
    made = options_from(file, {"epochs": 7}, ["augmentation.mirror_probability=0.5"])
    assert (made.data, made.epochs, made.augmentation.mirror_probability) == ("here", 7, 0.5)
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        options_from(file, {}, ["learning_rat=1"])
    with pytest.raises(ConfigError, match="needs --data"):
        options_from(None, {"output": "there"}, [])


def test_the_recipe_for_few_images_is_one_that_train_takes():
    from pathlib import Path

    from xaibatch.cli.train import options_from

    recipe = Path(__file__).parents[1] / "jobs" / "train-scratch.yaml"
    made = options_from(recipe, {"data": "here", "output": "there"}, [])
    assert made.initialisation == "mimetic"


@pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")  # inside ray.data, which Ray Train imports
def test_ray_trains_with_two_workers(cluster, toy, tmp_path):
    from xaibatch.cluster.train import train_on_ray

    node = cluster.add_node(num_cpus=2)
    try:
        train_on_ray(options(toy, tmp_path, epochs=1, num_workers=2))
    finally:
        cluster.remove_node(node)
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 1
    model = load_model(TINY, checkpoint=str(tmp_path / "run" / "model.safetensors"))
    assert model.class_names == ("a", "b")


def test_ray_is_not_started_for_data_that_leaks(tmp_path, monkeypatch):
    from xaibatch.cluster import train

    def start(engine):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(train, "connected", start)
    leaky = options(make_toy(tmp_path / "leaky", leak=True), tmp_path)
    with pytest.raises(DataError, match="more than one split"):
        train.train_on_ray(leaky)


def test_a_workers_own_error_is_found_inside_rays_wrappers():
    from ray.train import WorkerGroupError

    from xaibatch.cluster.train import _own_error

    mistake = DataError("training image cannot be used")
    assert _own_error(WorkerGroupError("a worker failed", {1: mistake})) is mistake
    assert _own_error(ValueError("anything else")) is None


# --- the twin curriculum -----------------------------------------------------------------------------------------


def test_contrast_multiplies_the_lesion_only():
    films = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = contrasted(films, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(found[0], films[0])
    torch.testing.assert_close(found[1, 0], films[1, 2] + 3 * (films[1, 0] - films[1, 2]))
    torch.testing.assert_close(found[:, -1], films[:, -1])


def test_films_of_a_pose_get_the_same_augmentation():
    film = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 255
    found = same_pose_augmented(film.expand(1, 3, 16, 16), torch.Generator().manual_seed(1))
    torch.testing.assert_close(found[:, 0], found[:, 2])
    assert (found[:, 0] - film[:, 0]).abs().mean() > 1


def test_kept_patches_favour_lung_rows_without_repeats():
    recipe = TwinRecipe()
    kept = kept_patches(400, 49, 14, recipe, torch.Generator().manual_seed(0))
    assert all(len(set(row.tolist())) == 49 for row in kept)
    rows = kept // 14
    inside = ((rows >= 2) & (rows < 11)).float().mean()
    # 126 of 196 patches lie in lung rows; drawn five times as readily they make up much more than that share.
    assert inside > 0.8


def test_kept_forward_with_all_patches_is_timm_forward():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, img_size=64).eval()
        bag = BagHead(vit.embed_dim, 3)
        images = torch.randn(2, 3, 64, 64)
    everything = torch.arange(16).expand(2, -1)
    for kept in (None, everything):
        torch.testing.assert_close(forward_kept(vit, bag, images, kept)[0], vit(images), atol=1e-5, rtol=1e-5)


def test_within_pose_loss_by_a_loop():
    logits = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    over_twin, between = [], []
    for pose in logits:

        def evidence(z):
            return torch.log(torch.exp(z[0]) + torch.exp(z[1])) - z[2]

        over_twin += [functional.softplus(2 - (evidence(film) - evidence(pose[4]))) for film in pose[:4]]
        for first in pose[:2]:
            for second in pose[2:4]:
                between.append(functional.softplus(2 - ((first[0] - first[1]) - (second[0] - second[1]))))
    expected = torch.stack(over_twin).mean() + torch.stack(between).mean()
    torch.testing.assert_close(within_pose_loss(logits, labels, margin=2.0), expected)


def test_twin_training_learns_a_plain_lesion_and_resumes_exactly():
    draws = torch.Generator().manual_seed(0)
    twin = torch.rand(12, 1, 64, 64, generator=draws) * 60 + 80
    films = twin.repeat(1, 5, 1, 1)
    films[:, :2, 8:24, 8:24] += 60
    films[:, 2:4, 40:56, 40:56] += 60
    films = films.clamp(0, 255).to(torch.uint8)
    labels = torch.tensor([0, 0, 1, 1, 2])
    recipe = TwinRecipe(
        num_steps=24,
        poses_per_step=6,
        warmup_steps=4,
        kept_patches=((1.0, 16),),
        start_contrast=1.5,
        learning_rate=1e-3,
    )

    def trainer():
        return TwinTrainer(films, labels, recipe, mean=0.45, std=0.1, seed=3)

    whole, first = trainer(), trainer()
    terms = []
    whole.run(24, lambda progress: terms.append(progress.terms))
    assert np.mean([t["pairs"] for t in terms[-4:]]) < 0.7 * np.mean([t["pairs"] for t in terms[:4]])
    first.run(10, lambda _: None)
    second = trainer()
    second.load_state(first.state())
    second.run(24, lambda _: None)
    for name, value in whole.average.state_dict().items():
        torch.testing.assert_close(second.average.state_dict()[name], value, rtol=0, atol=0)

"""A model that cheats by the simulator's marker is shown up: from a set's files to scores on the shortcut's mask."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage
from torch.nn import functional

from xaibatch.cli import main
from xaibatch.results.parts import RunFolder
from xaibatch.simulate import dataset, marks
from xaibatch.simulate.options import NORMAL, PNEUMONIA_LIKE, ShortcutOptions, SimulationOptions
from xaibatch.simulate.radiograph import Radiograph, class_of, split_of

SIZE = 64
VIT = {"img_size": SIZE, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
CLASSES = (PNEUMONIA_LIKE, NORMAL)
OPTIONS = SimulationOptions(
    size=SIZE, classes=CLASSES, split_shares={"train": 0.7, "test": 0.3}, shortcut=ShortcutOptions(kind="marker")
)
MEAN, STD = 0.4, 0.2


@pytest.fixture(scope="module")
def cheating_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 films of noise in the simulator's layout: in train the marker is all that tells the classes apart, in test
    every second film of either class carries it. The "lesion" of the mask cannot be seen on the film."""
    folder = tmp_path_factory.mktemp("cheating")
    marker_HW = marks.shortcut_marker(SIZE)
    lesion_HW, lung_HW = np.zeros((2, SIZE, SIZE), bool)
    lesion_HW[8:32, 8:32], lung_HW[4:48] = True, True
    for index in range(60):
        label, split = class_of(OPTIONS, index), split_of(OPTIONS, 1, index)
        noise_HW = np.random.default_rng(index).normal(100, 60, (SIZE, SIZE))
        film_HW = ndimage.gaussian_filter(noise_HW, 1).clip(0, 250)
        carries = (index // 2) % 2 == 0 if split == "test" else label == PNEUMONIA_LIKE
        image_HW = (marks.with_marker(film_HW, marker_HW) if carries else film_HW).astype(np.uint8)
        shortcut_HW = marker_HW if carries else None
        film = Radiograph(index, label, split, image_HW, image_HW, lesion_HW, lung_HW, shortcut_HW)
        dataset.write_radiograph(folder, film)
    return dataset.write_manifest(folder, 1, OPTIONS, 60)


@pytest.fixture(scope="module")
def cheater(cheating_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT trained on the set's train films, as a checkpoint."""
    rows = pd.read_csv(cheating_set)
    train = rows[rows.split == "train"]
    images_BCHW, labels_B = films(cheating_set, train), torch.tensor([CLASSES.index(label) for label in train.label])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **VIT)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        loss = functional.cross_entropy(model(images_BCHW), labels_B)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1
    path = tmp_path_factory.mktemp("model") / "cheater.safetensors"
    facts = {"classes": ",".join(CLASSES), "mean": str(MEAN), "std": str(STD), "resize_short": str(SIZE)}
    save_file(model.state_dict(), path, metadata=facts)
    return path


def films(manifest: Path, rows: pd.DataFrame) -> torch.Tensor:
    """The rows' films (B,3,H,W) as the model is fed."""
    grey = [Image.open(manifest.parent / path) for path in rows.path]
    values = torch.from_numpy(np.stack([np.asarray(image) for image in grey])).float() / 255
    return ((values - MEAN) / STD)[:, None].expand(-1, 3, -1, -1)


def shares(manifest: Path, output: Path, *weights: str) -> pd.DataFrame:
    """Scores of a run over the test films: each map's share of relevance on the marker and in the lesion."""
    with pytest.raises(SystemExit) as exit_:
        main([
            "evaluate", "--no-ray", "--no-report", "--data", str(manifest), "--split", "test", "--output", str(output),
            "--model", "vit_tiny_patch16_224", *weights, "--set", f"model.options={VIT}",
            "--explainers", "transformer_lrp,random", "--metrics", "on_lesion,on_shortcut",
            "--set", "metrics.on_lesion.use=attribution_localisation",
            "--set", "metrics.on_shortcut.use=attribution_localisation", "--set", "metrics.on_shortcut.mask=shortcut",
            "--set", "precision.default=float32",
        ])  # fmt: skip
    assert exit_.value.code == 0
    table = RunFolder(str(output)).read("scores").to_pandas()
    return table.merge(pd.read_csv(manifest)[["image_id", "mask_shortcut"]], on="image_id")


def test_an_explainer_shows_that_the_model_cheats(cheating_set: Path, cheater: Path, tmp_path: Path) -> None:
    """The marker covers a thirtieth of the film. Maps of the model that reads it lie there, a random map's share is the
    area's, and so is that of the same model before training; the lesion, which the model cannot see, gets no more
    than its area. Films without the marker are not scored, and counted."""
    table = shares(cheating_set, tmp_path / "cheater", "--checkpoint", str(cheater))
    area = marks.shortcut_marker(SIZE).mean()
    on_marker = table[table.metric == "on_shortcut"]
    carrying = on_marker.mask_shortcut.notna()
    assert carrying.groupby(on_marker.explainer).sum().min() > 3
    assert set(on_marker[carrying].status) == {"ok"} and set(on_marker[~carrying].status) == {"missing_mask"}
    found = on_marker[carrying].groupby("explainer").score.mean()
    assert found["transformer_lrp"] > 4 * area
    assert found["random"] == pytest.approx(area, rel=0.5)
    on_lesion = table[(table.metric == "on_lesion") & (table.status == "ok")].groupby("explainer").score.mean()
    assert on_lesion["transformer_lrp"] < 24**2 / SIZE**2
    before = shares(cheating_set, tmp_path / "before", "--set", "model.untrained=true")
    before = before[(before.metric == "on_shortcut") & (before.status == "ok")].groupby("explainer").score.mean()
    assert found["transformer_lrp"] > 3 * before["transformer_lrp"]


def test_its_accuracy_falls_where_the_marker_goes_with_no_class(cheating_set: Path, cheater: Path) -> None:
    from xaibatch.models.load import load_model

    model = load_model("vit_tiny_patch16_224", checkpoint=str(cheater), model_options=VIT)
    rows = pd.read_csv(cheating_set)
    for split, low, high in (("train", 0.95, 1.0), ("test", 0.2, 0.8)):
        chosen = rows[rows.split == split]
        answers = model(films(cheating_set, chosen)).argmax(1).numpy()
        assert low <= (np.array(CLASSES)[answers] == chosen.label.to_numpy()).mean() <= high

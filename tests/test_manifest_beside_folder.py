"""A folder of images and a manifest in it or above it: what the manifest knows is used, what is not used is said."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.toy import Watch, toy_config, toy_images
from xaibatch.data.dataset import open_dataset
from xaibatch.embedded import manifest_path
from xaibatch.errors import DataError
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate, preview
from xaibatch.results.parts import RECORD

NAMES = ("a/1.png", "a/2.png", "b/1.png", "b/2.png")
SYNTHETIC = "the images are simulated: synthetic, not for clinical use"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "set" / "images"
    for seed, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16), np.uint8)).save(root / name)
    return root


def write(folder: Path, *lines: str, header: str = "path,label,patient,split,mask_lesion") -> Path:
    """The manifest of some images, one line each; `images/` before the names where it lies in the folder above."""
    (folder / "manifest.csv").write_text("\n".join([header, *lines]) + "\n")
    return folder / "manifest.csv"


def row(name: str, patient: str) -> str:
    return f'{name},x,{patient},test,"box:16x16:1,2,3,4"'


@pytest.mark.parametrize("above", [True, False])
def test_a_whole_manifest_adds_what_it_knows(images: Path, above: bool) -> None:
    prefix, folder, where = ("images/", images.parent, " in the folder above") if above else ("", images, "")
    write(folder, *(row(prefix + name, f"p{index // 2}") for index, name in enumerate(NAMES)))
    dataset = open_dataset(str(images), layout="folder")
    assert [record.image_id for record in dataset.records] == list(NAMES)
    assert [record.label for record in dataset.records] == ["a", "a", "b", "b"]
    assert [record.patient for record in dataset.records] == ["p0", "p0", "p1", "p1"]
    assert {record.split for record in dataset.records} == {"test"}
    assert dataset.mask_names == ("lesion",)
    assert dataset.patients_from == f"column patient of manifest.csv{where}"
    assert not [note for note in dataset.notes if "manifest" in note]


def test_images_that_a_manifest_lacks_are_counted_and_the_others_keep_their_patients(images: Path) -> None:
    write(images.parent, *(row(f"images/{name}", "p1") for name in (*NAMES[:3], "a/gone.png")))
    dataset = open_dataset(str(images))
    assert [record.patient for record in dataset.records] == ["p1", "p1", "p1", None]
    assert [len(record.masks) for record in dataset.records] == [1, 1, 1, 0]
    assert dataset.notes == (
        "manifest.csv in the folder above lacks 1 of 4 images: their patients, masks and twins are unknown",
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (",x,p1,test,", r"row 6 has no path"),
        ("../../secret.png,x,p1,test,", r"row 6: '\.\./\.\./secret\.png' lies outside the manifest's folder"),
        (row("images/a/1.png", "p9"), r"1 image ids come more than once"),
        ("images/a/3.png,x,p1,test,,,", r"row 6: 7 cells under 5 columns"),
    ],
)
def test_a_malformed_manifest_of_these_images_stops(images: Path, line: str, reason: str) -> None:
    """Without its patients, the intervals would take a patient's images for independent ones."""
    write(images.parent, *(row(f"images/{name}", "p1") for name in NAMES), line)
    with pytest.raises(DataError, match=f"manifest.csv in the folder above belongs to the images .*{reason}.* Mend it"):
        open_dataset(str(images))


def test_a_manifest_that_is_no_table_stops(images: Path) -> None:
    (images.parent / "manifest.csv").write_bytes("path,label,patient\nimages/a/1.png,x,Müller\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot be used: manifest\.csv is not a CSV file in UTF-8"):
        open_dataset(str(images))


def test_paths_outside_are_allowed_here_too(images: Path) -> None:
    write(images.parent, *(row(f"images/{name}", "p1") for name in NAMES), "/elsewhere/x.png,x,p1,test,")
    dataset = open_dataset(str(images), allow_outside_root=True)
    assert (dataset.patients_from, dataset.notes) == ("column patient of manifest.csv in the folder above", ())


@pytest.mark.parametrize(
    ("lines", "header", "note"),
    [
        (["other/1.png,x"], "path,label", "it lists none of the images"),
        (["/etc/x.png,x"], "path,label", "it lists none of the images, and cannot be read (manifest.csv, row 2: '/etc"),
        (["images/a/1.png,x"], "file,label", "it has no columns path and label"),
    ],
)
def test_a_manifest_of_other_files_is_not_used_and_named(
    images: Path, lines: list[str], header: str, note: str
) -> None:
    write(images.parent, *lines, header=header)
    (found,) = open_dataset(str(images)).notes
    assert found.startswith(f"manifest.csv in the folder above is not used: {note}")


def test_the_nearest_manifest_that_lists_images_is_used(images: Path) -> None:
    write(images, "other.png,x,p0,,")
    write(images.parent, *(row(f"images/{name}", "p1") for name in NAMES))
    dataset = open_dataset(str(images), layout="folder")
    assert {record.patient for record in dataset.records} == {"p1"}
    assert dataset.notes[-1] == "manifest.csv is not used: it lists none of the images"


# -- simulated images


def test_simulated_images_are_synthetic_however_they_are_opened(images: Path) -> None:
    manifest = write(images.parent, *(row(f"images/{name}", "p1") for name in NAMES))
    assert open_dataset(str(manifest)).notes == ()
    (images.parent / "simulation.json").write_text("{}")
    for path in (manifest, images.parent, images):
        assert open_dataset(str(path)).notes == (SYNTHETIC,)


def test_other_images_below_a_simulated_set_are_not_called_synthetic(images: Path) -> None:
    write(images.parent, "rendered/1.png,x,p1,test,")
    (images.parent / "simulation.json").write_text("{}")
    assert open_dataset(str(images)).notes == (
        "manifest.csv in the folder above is not used: it lists none of the images",
    )
    (images / "simulation.json").write_text("{}")
    assert SYNTHETIC in open_dataset(str(images)).notes


@pytest.mark.parametrize("folder", ["images", "twins"])
def test_the_shipped_images_and_twins_are_synthetic(folder: str) -> None:
    assert SYNTHETIC in open_dataset(str(Path(str(manifest_path())).parent / folder)).notes


# -- what a run says


def test_a_run_says_and_records_what_a_manifest_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = toy_images(tmp_path / "data", num_per_class=1)
    write(tmp_path, row("data/covid/0.png", "p1"))
    (tmp_path / "simulation.json").write_text("{}")
    config = toy_config(data, tmp_path / "run", explainers={"random": {}}, metrics={"effective_complexity": {}})
    lacks = "manifest.csv in the folder above lacks 2 of 3 images: their patients, masks and twins are unknown"
    with caplog.at_level(logging.WARNING):
        preview(config)
    assert caplog.messages[:2] == [f"data: {SYNTHETIC}", f"data: {lacks}"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        folder = evaluate(config, run_local, Watch()).folder
    assert caplog.messages[:2] == [f"data: {SYNTHETIC}", f"data: {lacks}"]
    described = json.loads(Path(folder.path(RECORD)).read_text())["data"]
    assert described["notes"] == [SYNTHETIC, lacks]
    assert (described["synthetic"], described["num_patients"]) == (True, 1)

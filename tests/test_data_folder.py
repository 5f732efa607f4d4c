"""Folders of images: ids, labels, splits, links, and what is refused."""

from pathlib import Path

import pytest

from tests.image_files import count_labels, image_folder, records_of, write_grey
from xaibatch.data.dataset import open_dataset
from xaibatch.data.sampling import sample
from xaibatch.data.storage import list_files
from xaibatch.errors import DataError, UnknownNameError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "set")


def test_a_folder_gives_sorted_ids_labels_and_sizes(folder: Path) -> None:
    (folder / "a" / ".hidden.png").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.png").write_bytes(b"x")
    (folder / "b" / "notes.txt").write_text("x")
    dataset = open_dataset(str(folder))
    assert [record.image_id for record in dataset.records] == ["a/1.jpg", "a/3.png", "b/1.png", "b/deep/2.png"]
    assert [record.label for record in dataset.records] == ["a", "a", "b", "b"]
    assert dataset.records[0].path == str(folder / "a" / "1.jpg")
    assert dataset.class_names == ("a", "b")
    assert dataset.num_images_per_class == {"a": 2, "b": 2}
    assert dataset.layout == "folder"
    assert dataset.checksum_of == "ids, labels, patients, splits, masks, twins, sizes"
    assert dataset.notes == ("1 files that are no images by their name were left out",)


def test_an_empty_class_folder_is_named(folder: Path) -> None:
    (folder / "empty class").mkdir()
    with pytest.raises(DataError, match=r"no images in the class folder 'empty class'"):
        open_dataset(str(folder))


def test_images_without_class_folder_are_an_unlabelled_set(tmp_path: Path) -> None:
    write_grey(tmp_path / "set" / "1.png")
    dataset = open_dataset(str(tmp_path / "set"))
    assert dataset.class_names == ()
    assert dataset.records[0].label is None


def test_train_val_test_folders_are_splits_not_classes(tmp_path: Path) -> None:
    for split in ("train", "Validation", "test"):
        for name in ("x", "y"):
            write_grey(tmp_path / split / name / "1.png")
    dataset = open_dataset(str(tmp_path))
    assert dataset.class_names == ("x", "y")
    assert records_of(dataset)["Validation/x/1.png"].split == "val"
    assert [record.image_id for record in open_dataset(str(tmp_path), split="valid").records] == [
        "Validation/x/1.png",
        "Validation/y/1.png",
    ]
    with pytest.raises(DataError, match="its splits: test, train, val"):
        open_dataset(str(tmp_path), split="holdout")
    (tmp_path / "test" / "z").mkdir()
    with pytest.raises(DataError, match="class folder 'test/z'"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [("missing", "nothing at"), ("set/a/3.png", "one file, not a data set"), ("empty", "no images under")],
)
def test_what_is_no_data_set_is_refused(folder: Path, path: str, message: str) -> None:
    (folder.parent / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        open_dataset(str(folder.parent / path))


def test_an_unknown_layout_and_split_are_refused(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'folder'\? Known: auto, chexpert"):
        open_dataset(str(folder), layout="foldr")
    with pytest.raises(DataError, match="it names no splits"):
        open_dataset(str(folder), split="test")


def test_links_are_followed_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    write_grey(tmp_path / "other" / "9.png")
    (folder / "a" / "linked").symlink_to(tmp_path / "other")
    (folder / "a" / "circle").symlink_to(folder)
    ids = [entry.relative for entry in list_files(str(folder))]
    assert "a/linked/9.png" in ids
    assert len(ids) == 5


def test_the_real_sets_test_folder_knows_its_patients(shared: Path) -> None:
    dataset = open_dataset(str(shared / "data" / "cxr3" / "test"))
    assert dataset.num_images_per_class == {"COVID-19": 18, "Normal": 66, "Pneumonia": 60}
    assert dataset.patients_from == "column patient of manifest.csv in the folder above"
    assert all(record.patient for record in dataset.records)
    assert dataset.notes == ()
    assert count_labels(sample(dataset, 12, 0)) == {"COVID-19": 4, "Normal": 4, "Pneumonia": 4}

"""Manifests: what their columns give, what is wrong with them, and that no path leaves their folder."""

from pathlib import Path

import fsspec
import pandas as pd
import pytest

from tests.image_files import image_folder, write_grey
from xaibatch.data.dataset import open_dataset
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "set")


def write_manifest(folder: Path, text: str, name: str = "manifest.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_manifest_gives_every_column(folder: Path) -> None:
    path = write_manifest(
        folder,
        "\ufeffID,Path,label,patient,split,lung_mask,mask_lesion,twin,age\n"
        'one,a/3.png,"sick, very",p1,Test,b/1.png,"box:16x16:1,2,3,4",a/1.jpg,77\n'
        "two,a/1.jpg,,,,,,,\n",
    )
    first, second = open_dataset(path).records
    assert first == ImageRecord(
        image_id="one",
        path=str(folder / "a" / "3.png"),
        label="sick, very",
        patient="p1",
        split="test",
        masks={"lung": str(folder / "b" / "1.png"), "lesion": "box:16x16:1,2,3,4"},
        twin=str(folder / "a" / "1.jpg"),
    )
    assert second == ImageRecord(image_id="two", path=str(folder / "a" / "1.jpg"))
    assert open_dataset(str(folder)).layout == "manifest"
    assert open_dataset(str(folder), layout="folder").layout == "folder"


def test_csv_and_parquet_manifests_agree(folder: Path) -> None:
    table = pd.DataFrame({"path": ["a/3.png", "b/1.png"], "label": [0, 1], "patient": ["p", None]})
    table.to_csv(folder / "m.csv", index=False)
    table.to_parquet(folder / "m.parquet")
    of_csv, of_parquet = (open_dataset(str(folder / name)) for name in ("m.csv", "m.parquet"))
    assert of_csv.records == of_parquet.records
    assert of_csv.checksum == of_parquet.checksum
    assert of_csv.class_names == ("0", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nx,y\n", r"no column 'path'. Columns found: file, label; needed: path, label"),
        ("path,label\na/3.png,x\na/3.png,y\n", "1 image ids come more than once, for example 'a/3.png'"),
        ("path,label\n,x\n", "row 2 has no path"),
        ("path,label\n", "has no rows"),
        ("path,label,mask_lesion,lesion_mask\na/3.png,x,,\n", "two columns for the mask 'lesion'"),
        ("path,label\na/3.png,x,more\n", "row 2: 3 cells under 2 columns"),
        ('path,label\n"a/3.png,x\n', "not a CSV file"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_why(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(write_manifest(folder, text, "m.csv"))


def test_a_damaged_parquet_manifest_is_refused(folder: Path) -> None:
    (folder / "m.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a Parquet file"):
        open_dataset(str(folder / "m.parquet"))


@pytest.mark.parametrize("column", ["path", "twin", "lung_mask"])
@pytest.mark.parametrize(
    "outside",
    ["../secret.png", "a/../../secret.png", "{tmp}/secret.png", "link.png", "linked/secret.png", "s3://b/x.png"],
)
def test_no_path_of_a_manifest_leaves_its_folder(folder: Path, column: str, outside: str) -> None:
    write_grey(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "linked").symlink_to(folder.parent)
    values = {"path": "a/3.png", "label": "x", "twin": "", "lung_mask": "", column: outside.format(tmp=folder.parent)}
    manifest = write_manifest(folder, ",".join(values) + "\n" + ",".join(values.values()) + "\n")
    with pytest.raises(DataError, match="lies outside the manifest's folder"):
        open_dataset(manifest)
    assert len(open_dataset(manifest, allow_outside_root=True)) == 1


def test_a_remote_manifest_keeps_to_its_folder() -> None:
    memory = fsspec.filesystem("memory")
    for path in (
        "../x.png",
        "memory://rooted/set/../x.png",
        "memory://rooted/settled/x.png",
        "/rooted/x.png",
        "file:///x.png",
    ):
        memory.pipe("/rooted/set/m.csv", f"path,label\n{path},a\n".encode())
        with pytest.raises(DataError, match="lies outside"):
            open_dataset("memory://rooted/set/m.csv")
    memory.pipe("/rooted/set/m.csv", b"path,label\nsub/x.png,a\nmemory://rooted/set/y.png,a\n")
    assert [record.path for record in open_dataset("memory://rooted/set/m.csv").records] == [
        "memory://rooted/set/y.png",
        "memory://rooted/set/sub/x.png",
    ]

"""What counts as the same data: every change that could change a row is noticed, another place is not."""

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from tests.image_files import image_folder
from tests.toy import Watch, toy_config, toy_images
from xaibatch.config import RunConfig
from xaibatch.data.dataset import open_dataset
from xaibatch.errors import RunFolderError
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.run import evaluate
from xaibatch.results.parts import RECORD

HEADER = "image_id,path,label,patient,split,mask_lesion,mask_lung,twin"
ROWS = (
    ["one", "images/1.png", "a", "p1", "test", "box:16x16:1,2,3,4", "masks/1.png", "twins/1.png"],
    ["two", "images/2.png", "b", "p1", "test", "", "masks/2.png", ""],
)


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16), np.uint8)).save(path)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    for seed, name in enumerate(["images/1", "images/2", "masks/1", "masks/2", "masks/3", "twins/1", "twins/2"]):
        write_image(tmp_path / "set" / f"{name}.png", seed)
    return written(tmp_path / "set" / "manifest.csv")


def written(path: Path, row: int = 0, column: str = "label", value: str = "a") -> Path:
    """The manifest with one cell set otherwise."""
    rows = [list(cells) for cells in ROWS]
    rows[row][HEADER.split(",").index(column)] = value
    path.write_text("\n".join([HEADER, *(",".join(f'"{cell}"' for cell in cells) for cells in rows)]) + "\n")
    return path


@pytest.mark.parametrize("contents", [False, True])
@pytest.mark.parametrize(
    ("row", "column", "value"),
    [
        (0, "image_id", "won"),
        (0, "label", "b"),
        (1, "patient", "p2"),
        (1, "patient", ""),
        (0, "split", "train"),
        (0, "mask_lesion", "box:16x16:9,2,3,4"),
        (0, "mask_lesion", ""),
        (1, "mask_lesion", "masks/2.png"),
        (0, "mask_lung", "masks/3.png"),
        (0, "twin", ""),
        (1, "twin", "twins/2.png"),
    ],
)
def test_any_cell_of_a_manifest_tells(manifest: Path, row: int, column: str, value: str, contents: bool) -> None:
    before = open_dataset(str(manifest), contents=contents).checksum
    assert open_dataset(str(written(manifest)), contents=contents).checksum == before
    assert open_dataset(str(written(manifest, row, column, value)), contents=contents).checksum != before


@pytest.mark.parametrize("name", ["images/1.png", "masks/1.png", "twins/1.png"])
def test_sizes_tell_and_contents_tell_more(manifest: Path, name: str) -> None:
    listed, whole = (open_dataset(str(manifest), contents=contents) for contents in (False, True))
    assert listed.checksum_of == "ids, labels, patients, splits, masks, twins, sizes"
    assert whole.checksum_of == f"{listed.checksum_of}, contents"
    file = manifest.parent / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert open_dataset(str(manifest)).checksum == listed.checksum
    assert open_dataset(str(manifest), contents=True).checksum != whole.checksum
    file.write_bytes(content + b"0")
    assert open_dataset(str(manifest)).checksum != listed.checksum


@pytest.mark.parametrize("contents", [False, True])
def test_another_place_tells_nothing(manifest: Path, tmp_path: Path, contents: bool) -> None:
    """The manifest, its folder, and the folder of images under it with the manifest above."""
    moved = tmp_path / "deep" / "elsewhere"
    shutil.copytree(manifest.parent, moved)
    for name, layout in (("manifest.csv", "auto"), (".", "auto"), ("images", "folder")):
        here, there = (
            open_dataset(str(root / name), layout=layout, contents=contents) for root in (manifest.parent, moved)
        )
        assert here.mask_names == ("lesion", "lung")
        assert here.checksum == there.checksum


def test_the_checksum_follows_content_not_place(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set")
    first = open_dataset(str(folder), contents=True)
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert open_dataset(str(moved), contents=True).checksum == first.checksum
    same_size = bytearray((moved / "a" / "3.png").read_bytes())
    same_size[-1] ^= 1
    (moved / "a" / "3.png").write_bytes(same_size)
    assert open_dataset(str(moved), contents=True).checksum != first.checksum
    assert open_dataset(str(moved)).checksum == open_dataset(str(folder)).checksum
    (moved / "a" / "3.png").write_bytes(same_size + b"0")
    assert open_dataset(str(moved)).checksum != open_dataset(str(folder)).checksum
    (moved / "a").rename(moved / "c")
    assert open_dataset(str(moved)).checksum != open_dataset(str(folder)).checksum


def test_masks_outside_the_manifest_s_folder_count_by_name(manifest: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "drawn" / "1.png", 8)
    shutil.copytree(tmp_path / "drawn", tmp_path / "copy" / "drawn")

    def checksum(mask: Path) -> str:
        return open_dataset(str(written(manifest, 0, "mask_lung", str(mask))), allow_outside_root=True).checksum

    here = checksum(tmp_path / "drawn" / "1.png")
    assert checksum(tmp_path / "copy" / "drawn" / "1.png") == here
    (tmp_path / "drawn" / "1.png").rename(tmp_path / "drawn" / "2.png")
    assert checksum(tmp_path / "drawn" / "2.png") != here


def test_masks_in_an_object_store_tell_by_their_paths(manifest: Path) -> None:
    memory = fsspec.filesystem("memory")

    def checksum(place: str, *change: object) -> str:
        memory.pipe(f"/{place}/m.csv", written(manifest, *change).read_bytes())  # type: ignore[arg-type]
        return open_dataset(f"memory://{place}/m.csv").checksum

    assert checksum("one") == checksum("two/deep")
    assert checksum("one") != checksum("one", 0, "mask_lung", "masks/3.png")


def toy_run(folder: Path, patient: str) -> RunConfig:
    """A small run over a manifest that files every image under one patient."""
    images = toy_images(folder / "images", num_per_class=2)
    rows = [f"{path.relative_to(folder)},{path.parent.name},{patient}" for path in sorted(images.rglob("*.png"))]
    (folder / "manifest.csv").write_text("\n".join(["path,label,patient", *rows]))
    return toy_config(
        folder / "manifest.csv", folder / "run", explainers={"random": {}}, metrics={"effective_complexity": {}}
    )


def test_a_run_is_not_taken_up_with_other_patients(tmp_path: Path) -> None:
    """The patients stand in the rows and decide which images an interval takes together."""
    evaluate(toy_run(tmp_path, "p1"), lambda job, work, progress: run_local(job, list(work)[:1], progress), Watch())
    with pytest.raises(RunFolderError, match=r"data at .* has changed since the run"):
        evaluate(toy_run(tmp_path, "p2"), run_local, Watch())
    outcome = evaluate(toy_run(tmp_path, "p1"), run_local, Watch())
    assert set(outcome.folder.read("scores")["patient"].to_pylist()) == {"p1"}


def test_a_checksum_of_other_things_is_not_called_a_change(tmp_path: Path) -> None:
    record = evaluate(toy_run(tmp_path, "p1"), run_local, Watch()).folder.path(RECORD)
    Path(record).write_text(Path(record).read_text().replace("ids, labels, patients, ", "ids, labels, "))
    with pytest.raises(RunFolderError, match=r"SHA-256 of ids, labels, splits.* now it is of ids, labels, patients"):
        evaluate(toy_run(tmp_path, "p1"), run_local, Watch())

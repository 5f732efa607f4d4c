"""Folders, manifests, sampling, decoding, preprocessing and shard loading."""

import io
import logging
import random
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xaibatch.data.boxes import boxes_mask
from xaibatch.data.dataset import DataSet, open_dataset
from xaibatch.data.decode import DecodedImage, ImageLimits, decode_image, decode_mask
from xaibatch.data.labels import label_indices
from xaibatch.data.load import load_shard, resized_mask
from xaibatch.data.preprocess import Preprocessing, from_metadata, from_timm
from xaibatch.data.sampling import sample, shards
from xaibatch.data.storage import ReadOptions, StoreError, filesystem, list_files, read_bytes
from xaibatch.errors import DataError, ImageError, ModelError, UnknownNameError, UsageError
from xaibatch.types import ImageRecord, Shard

SMALL = Preprocessing(image_size=(16, 16), resize_short=16, mean=(0.5,), std=(0.25,))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_grey(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for index, name in enumerate(["b/1.png", "b/deep/2.png", "a/3.png", "a/1.jpg"]):
        write_grey(root / name, index)
    return root


def records_of(dataset: DataSet) -> dict[str, ImageRecord]:
    return {record.image_id: record for record in dataset.records}


# -- folders


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
    assert (dataset.layout, dataset.checksum_of) == ("folder", "ids, labels, sizes")
    assert dataset.notes == ("1 files that are no images by their name were left out",)


def test_the_checksum_follows_content_not_place(folder: Path, tmp_path: Path) -> None:
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


def test_a_manifest_above_gives_patients_only_where_it_covers_the_folder(folder: Path) -> None:
    rows = [f"set/{entry.relative},x,p{index}" for index, entry in enumerate(list_files(str(folder)))]
    manifest = folder.parent / "manifest.csv"
    manifest.write_text("\n".join(["path,label,patient", *rows]))
    dataset = open_dataset(str(folder))
    assert dataset.layout == "folder"
    assert dataset.patients_from == "column patient of manifest.csv in the folder above"
    assert [record.patient for record in dataset.records] == ["p0", "p1", "p2", "p3"]
    assert dataset.class_names == ("a", "b")
    manifest.write_text("\n".join(["path,label,patient", *rows[1:]]))
    assert open_dataset(str(folder)).patients_from is None


# -- manifests


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


def test_a_simulated_set_says_that_it_is_synthetic(folder: Path) -> None:
    path = write_manifest(folder, "path,label\na/3.png,x\n")
    assert open_dataset(path).notes == ()
    (folder / "simulation.json").write_text("{}")
    assert open_dataset(path).notes == ("the images are simulated: synthetic, not for clinical use",)


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


# -- remote folders


def test_a_remote_folder_equals_the_local_one(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for entry in list_files(str(folder)):
        memory.pipe(f"/bucket/set/{entry.relative}", Path(entry.path).read_bytes())
    memory.pipe("/bucket/set/a/.hidden.png", b"x")
    local, remote = open_dataset(str(folder)), open_dataset("memory://bucket/set/")
    assert remote.checksum == local.checksum
    assert remote.records[0].path == "memory://bucket/set/a/1.jpg"
    one, two = (load_shard(shards(data.records, 9)[0], SMALL, ("a", "b"))[0] for data in (local, remote))
    assert one.ids == two.ids
    np.testing.assert_array_equal(one.images_BCHW, two.images_BCHW)


def test_a_folder_in_an_s3_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "someone"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("xrays")
        for entry in list_files(str(folder)):
            store.pipe(f"xrays/set/{entry.relative}", Path(entry.path).read_bytes())
        local, remote = open_dataset(str(folder)), open_dataset("s3://xrays/set")
        assert remote.checksum == local.checksum
        gone = ImageRecord(image_id="gone", path="s3://xrays/set/gone.png")
        batch, failures = load_shard(Shard(index=0, records=(*remote.records, gone)), SMALL, ("a", "b"))
        expected, _ = load_shard(Shard(index=0, records=local.records), SMALL, ("a", "b"))
        np.testing.assert_array_equal(batch.images_BCHW, expected.images_BCHW)
        assert [(failure.image_id, failure.message) for failure in failures] == [("gone", "the file does not exist")]
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        server.stop()


def test_an_unknown_protocol_says_so() -> None:
    with pytest.raises(DataError, match="cannot open 'nowhere://x'"):
        open_dataset("nowhere://x")


def test_a_read_that_fails_in_passing_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    system = filesystem("memory://flaky/x")[0]
    system.pipe("/flaky/x", b"content")
    calls = []

    def flaky(path: str, mode: str) -> io.BytesIO:
        calls.append(path)
        if len(calls) < 3:
            raise TimeoutError("read timed out")
        return io.BytesIO(b"content")

    monkeypatch.setattr(type(system), "open", lambda self, path, mode: flaky(path, mode))
    assert read_bytes("memory://flaky/x", ReadOptions(first_wait_s=0)) == b"content"
    assert len(calls) == 3


def test_a_store_that_always_fails_is_no_fault_of_the_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = filesystem("memory://down/x")[0]
    calls = []

    def fail(self: object, path: str, mode: str = "") -> None:
        calls.append(path)
        raise RuntimeError("endpoint is\ndown")  # client libraries raise what they like

    monkeypatch.setattr(type(system), "open", fail)
    records = (ImageRecord(image_id="x", path="memory://down/x.png"), *open_dataset(str(folder)).records)
    reading = ReadOptions(first_wait_s=0, num_attempts=3)
    with pytest.raises(StoreError, match=r"could not be read \(3 attempts\): RuntimeError: endpoint is down"):
        load_shard(Shard(index=0, records=records), SMALL, ("a", "b"), reading=reading)
    assert len(calls) == 3
    monkeypatch.setattr(type(system), "isdir", fail)
    with pytest.raises(DataError, match="cannot read 'memory://down'"):
        open_dataset("memory://down")


def test_a_missing_file_is_not_tried_again_and_a_large_one_not_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bytes(str(tmp_path / "x"), ReadOptions(first_wait_s=1000))
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_bytes(str(tmp_path / "large"), ReadOptions(max_bytes=4, first_wait_s=1000))


# -- samples and shards


def made_up(counts: dict[str | None, int]) -> DataSet:
    records = tuple(
        ImageRecord(image_id=f"{label}/{index:03}", path="x", label=label)
        for label, count in counts.items()
        for index in range(count)
    )
    names = tuple(sorted(label for label in counts if label))
    return DataSet(records=records, root="r", layout="folder", class_names=names, checksum="c", checksum_of="ids")


def count_labels(dataset: DataSet) -> dict[str | None, int]:
    labels = [record.label for record in dataset.records]
    return {label: labels.count(label) for label in set(labels)}


def test_a_sample_is_balanced_and_filled_from_larger_classes() -> None:
    assert count_labels(sample(made_up({"a": 50, "b": 9, "c": 20}), 12, 0)) == {"a": 4, "b": 4, "c": 4}
    assert count_labels(sample(made_up({"a": 50, "b": 2, "c": 20}), 12, 0)) == {"a": 5, "b": 2, "c": 5}
    assert sorted(count_labels(sample(made_up({"a": 50, "b": 9, "c": 20}), 11, 0)).values()) == [3, 4, 4]
    assert count_labels(sample(made_up({None: 50, "b": 9}), 12, 0)) == {"b": 9, None: 3}
    whole = made_up({"a": 3})
    assert sample(whole, 3, 0) is whole
    assert sample(whole, None, 0) is whole
    with pytest.raises(UsageError, match="received a limit of 0"):
        sample(whole, 0, 0)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 20), min_size=1),
    limit=st.integers(1, 40),
    seed=st.integers(0, 9),
    shuffle=st.randoms(use_true_random=False),
)
def test_a_sample_does_not_depend_on_the_listing_order(
    counts: dict[str | None, int], limit: int, seed: int, shuffle: random.Random
) -> None:
    dataset = made_up(counts)
    records = list(dataset.records)
    shuffle.shuffle(records)
    chosen = sample(dataset, limit, seed)
    again = sample(replace(dataset, records=tuple(records)), limit, seed)
    assert {r.image_id for r in chosen.records} == {r.image_id for r in again.records}
    assert len(chosen) == min(limit, sum(counts.values()))
    found = count_labels(chosen)
    # As even as it can be: a class has at most one image more than any other that is not used up.
    for label, total in counts.items():
        assert found.get(label, 0) == total or max(found.values()) - found.get(label, 0) <= 1
    smaller = {r.image_id for r in sample(dataset, max(limit - 1, 1), seed).records}
    assert smaller <= {r.image_id for r in chosen.records}


def test_samples_of_other_seeds_differ_and_have_their_own_checksum() -> None:
    dataset = made_up({"a": 50, "b": 50})
    one, two = sample(dataset, 10, 0), sample(dataset, 10, 1)
    assert [r.image_id for r in one.records] != [r.image_id for r in two.records]
    assert len({dataset.checksum, one.checksum, two.checksum}) == 3
    assert one.class_names == dataset.class_names


@settings(deadline=None)
@given(num=st.integers(0, 30), size=st.integers(1, 12))
def test_shards_are_consecutive_and_complete(num: int, size: int) -> None:
    records = made_up({"a": num}).records
    cut = shards(records, size)
    assert [record for shard in cut for record in shard.records] == list(records)
    assert [shard.index for shard in cut] == list(range(-(-num // size)))
    assert all(len(shard.records) == size for shard in cut[:-1])


# -- labels


def test_labels_match_exactly_first_then_without_case() -> None:
    assert label_indices(["COVID-19", "normal", None], ["Normal", "COVID-19"]).tolist() == [1, 0, -1]
    assert label_indices(["a", "A"], ["A", "a"]).tolist() == [1, 0]
    with pytest.raises(DataError) as caught:
        label_indices(["x", "Normal"], ["Normal", "COVID-19"])
    assert "does not know: 'x'" in str(caught.value)
    assert "Labels of the data: 'Normal', 'x'; classes of the model: 'Normal', 'COVID-19'" in str(caught.value)
    with pytest.raises(DataError):
        label_indices(["aA"], ["AA", "aa"])


# -- decoding


def grey_image(mode: str = "L") -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 10), np.uint8)).convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_eight_bit_grey_is_kept(kind: str) -> None:
    decoded = decode_image(encoded(grey_image(), kind))
    np.testing.assert_array_equal(decoded.values, np.asarray(grey_image()))
    assert (decoded.values.dtype, decoded.full_range) == (np.uint8, 255.0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_kept_with_its_range(kind: str) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (12, 10), np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values), kind))
    np.testing.assert_array_equal(decoded.values, values.astype(np.float32))
    assert decoded.full_range == 65535.0


def test_colour_alpha_palette_and_one_bit_forms() -> None:
    rgb = np.random.default_rng(2).integers(0, 256, (12, 10, 3), np.uint8)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(rgb))).values, rgb)
    alpha = np.dstack([rgb, np.full((12, 10), 7, np.uint8)])
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(alpha))).values, rgb)
    grey_alpha = Image.merge("LA", (grey_image(), Image.new("L", (10, 12), 7)))
    np.testing.assert_array_equal(decode_image(encoded(grey_alpha)).values, np.asarray(grey_image()))
    bits = grey_image().point(lambda value: 255 * (value > 99)).convert("1")
    np.testing.assert_array_equal(decode_image(encoded(bits)).values, np.asarray(bits).astype(np.uint8) * 255)
    palette = Image.fromarray(rgb).quantize(16)
    np.testing.assert_array_equal(decode_image(encoded(palette)).values, np.asarray(palette.convert("RGB")))
    grey_palette = Image.fromarray(np.arange(120, dtype=np.uint8).reshape(12, 10), "P")
    grey_palette.putpalette([level for level in range(256) for _ in range(3)])
    np.testing.assert_array_equal(decode_image(encoded(grey_palette)).values, np.arange(120).reshape(12, 10))


def test_palette_with_transparency_raises_no_warning() -> None:
    palette = Image.fromarray(np.arange(120, dtype=np.uint8).reshape(12, 10), "P")
    palette.putpalette([level for level in range(256) for _ in range(3)])
    content = encoded(palette, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(content).values.shape == (12, 10)


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(grey_image(), "JPEG", exif=exif.tobytes())).values.shape == (12, 10)


def bad_files() -> dict[str, tuple[bytes, str]]:
    png = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)))
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    bomb = png[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    return {
        "zero bytes": (b"", "empty"),
        "text": (b"not an image, just words " * 20, "not an image that can be read"),
        "truncated": (png[: len(png) // 2], "truncated or damaged"),
        "header only": (png[:20], "not an image|header is damaged|truncated"),
        "one pixel": (encoded(Image.new("L", (1, 1))), "1x1 pixels; each side needs at least 8"),
        "narrow": (encoded(Image.new("L", (500, 3))), "500x3 pixels"),
        "bomb": (bomb, "more pixels than Pillow opens|more than the limit"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "not an image that can be read"),
        "float": (encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "not finite"),
        "32 bit": (encoded(Image.fromarray(np.full((9, 9), 1 << 20, np.int32)), "TIFF"), "32-bit values"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_what_is_no_image_gives_one_clear_line(name: str) -> None:
    content, message = bad_files()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=message) as caught:
            decode_image(content)
    assert "\n" not in str(caught.value)


def test_the_pixel_limit_is_an_argument() -> None:
    content = encoded(Image.new("L", (40, 30)))
    assert decode_image(content, ImageLimits(max_pixels=1200)).values.shape == (30, 40)
    with pytest.raises(ImageError, match="more than the limit of 1,199"):
        decode_image(content, ImageLimits(max_pixels=1199))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_never_raise_anything_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "PPM"]))
    content = bytearray(encoded(grey_image(), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            decoded = decode_image(bytes(content[:cut]))
        except ImageError:
            return
    assert min(decoded.values.shape[:2]) >= 8


def test_masks_of_every_form_mean_the_same() -> None:
    inside = np.zeros((12, 10), bool)
    inside[3:7, 2:8] = True
    for levels in (inside * 255, inside * 1, inside * 7):
        np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(levels.astype(np.uint8)))), inside)
    colour = Image.fromarray(np.dstack([inside * 200, inside * 0, inside * 0]).astype(np.uint8))
    np.testing.assert_array_equal(decode_mask(encoded(colour)), inside)
    np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(inside))), inside)
    np.testing.assert_array_equal(decode_mask(encoded(Image.fromarray(inside.astype(np.uint16) * 65535))), inside)
    # A nearly black JPEG is an empty mask, not a map of label numbers.
    assert not decode_mask(encoded(Image.fromarray(np.full((12, 10), 3, np.uint8)), "JPEG")).any()


# -- boxes


def test_boxes_are_scaled_and_joined() -> None:
    text = "box:1024x1024:256,512,256,128;0,0,64,64"
    expected = np.zeros((16, 16), bool)
    expected[8:10, 4:8] = True
    expected[0, 0] = True
    np.testing.assert_array_equal(boxes_mask(text, (16, 16)), expected)
    for wrong in ("box:1x1", "box:8x8:1,2,3", "box:0x8:1,2,3,4", "box:8x8:1,2,0,4", "box:8x8:a,b,c,d", "box:"):
        with pytest.raises(ImageError, match="not a list of boxes"):
            boxes_mask(wrong, (8, 8))


# -- preprocessing


def test_preprocessing_equals_the_golden_inputs_exactly(shared: Path) -> None:
    golden = np.load(shared / "golden" / "tiny_lrp.npz")
    known = records_of(open_dataset(str(shared / "data" / "cxr3"), split="test"))
    shard = Shard(index=0, records=tuple(known[str(path)] for path in golden["paths"]))
    # The published mean and standard deviation, rounded to four digits, are those of the golden inputs.
    rounded = Preprocessing(mean=(0.5509,), std=(0.2387,), grey=True)
    batch, failures = load_shard(shard, rounded, ("COVID-19", "Pneumonia", "Normal"))
    assert failures == ()
    np.testing.assert_array_equal(batch.images_BCHW, golden["x"])
    np.testing.assert_array_equal(batch.labels_B, golden["y_true"])


def test_the_real_sets_test_folder_knows_its_patients(shared: Path) -> None:
    dataset = open_dataset(str(shared / "data" / "cxr3" / "test"))
    assert dataset.num_images_per_class == {"COVID-19": 18, "Normal": 66, "Pneumonia": 60}
    assert dataset.patients_from == "column patient of manifest.csv in the folder above"
    assert all(record.patient for record in dataset.records)
    assert dataset.notes == ()
    assert count_labels(sample(dataset, 12, 0)) == {"COVID-19": 4, "Normal": 4, "Pneumonia": 4}


@pytest.mark.parametrize("size", [(256, 351), (301, 300), (64, 500), (1000, 999), (224, 224), (249, 248)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("crop", [("center", 0.9), ("squash", 0.875), ("center", 1.0)])
def test_preprocessing_equals_timms_transform(size: tuple[int, int], mode: str, crop: tuple[str, float]) -> None:
    from timm.data import create_transform

    config = {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": crop[1],
        "crop_mode": crop[0],
    }
    generator = np.random.default_rng(size)
    image = Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).convert(mode)
    expected = create_transform(**config)(image.convert("RGB")).numpy()
    ours = from_timm(config, (224, 224), 3).apply(decode_image(encoded(image)))
    np.testing.assert_array_equal(ours, expected)


def test_a_slow_rewrite_of_resize_and_crop_agrees() -> None:
    """Bilinear with Pillow's low-pass, from its definition: a triangle of twice the scale, per axis, in float64."""

    def weights(num_in: int, num_out: int) -> np.ndarray:
        scale = num_in / num_out
        support = max(scale, 1.0)
        matrix = np.zeros((num_out, num_in))
        for row in range(num_out):
            centre = (row + 0.5) * scale
            matrix[row] = np.maximum(0, 1 - np.abs(np.arange(num_in) + 0.5 - centre) / support)
        return matrix / matrix.sum(1, keepdims=True)

    values = np.random.default_rng(3).integers(0, 65536, (60, 90)).astype(np.float32)
    preprocessing = Preprocessing(image_size=(20, 20), resize_short=30, mean=(0.4,), std=(0.3,), channels=1)
    expected = weights(60, 30) @ values.astype(np.float64) @ weights(90, 45).T
    expected = (expected[5:25, 12:32] / 65535 - 0.4) / 0.3
    ours = preprocessing.apply(DecodedImage(values=values, full_range=65535.0), np.float64)
    np.testing.assert_allclose(ours[0], expected, atol=2e-6)


def test_eight_and_sixteen_bits_of_the_same_picture_agree() -> None:
    eight = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
    sixteen = eight.astype(np.uint16) * 257
    preprocessing = Preprocessing(image_size=(32, 32), resize_short=None, mean=(0.5,), std=(0.2,))
    one, two = (preprocessing.apply(decode_image(encoded(Image.fromarray(v))), np.float64) for v in (eight, sixteen))
    np.testing.assert_allclose(one, two, atol=1e-12)


def test_grey_and_colour_channels() -> None:
    rgb = np.random.default_rng(2).integers(0, 256, (16, 16, 3), np.uint8)
    decoded = DecodedImage(values=rgb, full_range=255.0)
    kept = SMALL.apply(decoded)
    np.testing.assert_allclose(kept, (rgb.transpose(2, 0, 1) / 255 - 0.5) / 0.25, atol=1e-6)
    grey = SMALL.model_copy(update={"grey": True}).apply(decoded)
    np.testing.assert_array_equal(grey[0], grey[1])
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey[0] * 0.25 + 0.5, luma / 255, atol=0.51 / 255)
    single = Preprocessing(image_size=(16, 16), resize_short=16, mean=(0.5,), std=(0.25,), channels=1)
    np.testing.assert_array_equal(single.apply(decoded), grey[:1])
    assert SMALL.apply(decoded, np.float64).dtype == np.float64


def test_min_max_range_and_floating_point_files() -> None:
    values = np.random.default_rng(2).normal(size=(16, 16)).astype(np.float32)
    decoded = decode_image(encoded(Image.fromarray(values), "TIFF"))
    with pytest.raises(ImageError, match="set value_range to 'min_max'"):
        SMALL.apply(decoded)
    scaled = SMALL.model_copy(update={"value_range": "min_max"}).apply(decoded)[0] * 0.25 + 0.5
    np.testing.assert_allclose(scaled, (values - values.min()) / (values.max() - values.min()), atol=1e-6)
    flat = DecodedImage(values=np.full((16, 16), 9, np.uint8), full_range=255.0)
    assert (SMALL.model_copy(update={"value_range": "min_max"}).apply(flat) == -2).all()


def test_an_image_smaller_than_the_crop_is_refused_without_resize() -> None:
    preprocessing = Preprocessing(image_size=(16, 16), resize_short=None)
    with pytest.raises(ImageError, match="10x20 pixels is smaller than the crop of 16x16"):
        preprocessing.apply(DecodedImage(values=np.zeros((10, 20), np.uint8), full_range=255.0))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(8, 200), width=st.integers(8, 200), short=st.integers(16, 40))
def test_a_mask_follows_its_image(height: int, width: int, short: int) -> None:
    """A bright rectangle, sampled without blur, and its mask land on the same pixels."""
    inside = np.zeros((height, width), bool)
    inside[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    preprocessing = Preprocessing(
        image_size=(16, 16), resize_short=short, interpolation="nearest", mean=(0.0,), std=(1.0,)
    )
    image = DecodedImage(values=inside.astype(np.uint8) * 255, full_range=255.0)
    np.testing.assert_array_equal(preprocessing.apply(image)[0] > 0.5, preprocessing.apply_mask(inside))


def test_preprocessing_survives_json_and_checks_itself() -> None:
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(1, 1, 1), resize_short=None)
    assert Preprocessing.model_validate_json(preprocessing.model_dump_json()) == preprocessing
    for wrong in ({"std": (0.0,)}, {"mean": (0.1, 0.2)}, {"resize_short": 100}, {"image_size": (0, 224)}, {"size": 3}):
        with pytest.raises(ValueError, match=r"positive|values; expected|smaller than the crop|Extra inputs"):
            Preprocessing(**wrong)


def test_preprocessing_from_metadata() -> None:
    found = from_metadata({"mean": "0.55", "std": "0.24"}, (224, 224), 3, "here")
    assert found == Preprocessing(mean=(0.55,), std=(0.24,), grey=True, resize_short=256, source="here")
    found = from_metadata(
        {"mean": [0.1, 0.2, 0.3], "std": "1,1,1", "crop_pct": 1, "interpolation": "bicubic"}, (96, 96), 3, ""
    )
    assert found is not None
    assert (found.grey, found.resize_short, found.interpolation, found.mean) == (False, 96, "bicubic", (0.1, 0.2, 0.3))
    whole = Preprocessing(mean=(0.3,), std=(0.2,), crop_rounding="half_even")
    assert from_metadata({"preprocessing": whole.model_dump_json(), "mean": "9"}, (1, 1), 3, "default") == whole
    assert from_metadata({"classes": "a,b"}, (224, 224), 3, "") is None
    for wrong in ({"mean": "x", "std": "1"}, {"mean": "1,2", "std": "1"}, {"preprocessing": "{}}"}):
        with pytest.raises(ModelError, match="preprocessing cannot be used"):
            from_metadata(wrong, (224, 224), 3, "")


# -- shards


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

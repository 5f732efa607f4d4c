"""Folders in object stores equal local ones; failures of a store are no failures of an image."""

import io
import logging
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.image_files import SMALL, image_folder
from xaibatch.data.dataset import open_dataset
from xaibatch.data.load import load_shard
from xaibatch.data.sampling import shards
from xaibatch.data.storage import ReadOptions, StoreError, filesystem, list_files, read_bytes
from xaibatch.errors import DataError
from xaibatch.types import ImageRecord, Shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "set")


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

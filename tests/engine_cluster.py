"""Fixtures of the engine's tests: one small Ray cluster for all of them, and comparisons of whole run folders."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pandas as pd
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.toy import toy_images
from xaibatch.results.parts import RunFolder

ROOT = Path(__file__).resolve().parents[1]
FAULTS = "XAIBATCH_TEST_FAULTS"
"""Environment variable naming the folder whose files switch on the faults of tests/engine_faults.py."""

KEYS = {
    "scores": ["image_id", "explainer", "metric", "repeat"],
    "maps": ["image_id", "explainer", "repeat"],
    "predictions": ["image_id"],
    "failures": ["image_id", "stage"],
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head node with two CPUs and no GPU; tests add and remove nodes of their own. The driver is this process.

    Its processes find the keys and the address of an object store in their environment; whether there is one is the
    fixture `store`'s business.
    """
    folder = tempfile.mkdtemp(prefix="xb-")
    faults = Path(folder) / "faults"
    faults.mkdir()
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "2")  # of the client library itself, whose pauses are long
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv(FAULTS, str(faults))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)
        made = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "num_gpus": 0,
                "include_dashboard": False,
                "_system_config": {"metrics_report_interval_ms": 500},
            },
        )
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def faults(cluster: Cluster) -> Iterator[Path]:
    """The folder whose files switch on faults; emptied afterwards."""
    folder = Path(os.environ[FAULTS])
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.fixture(scope="session")
def store(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An S3-compatible store with a bucket `chest`; half of its requests fail while the folder given has a file
    `fail`."""
    folder = tmp_path_factory.mktemp("store")
    port = os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]
    command = [sys.executable, str(ROOT / "tests" / "engine_store.py"), str(folder), port]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n", (folder / "log").read_text()
        fsspec.filesystem("s3").mkdir("chest")
        yield folder
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve toy images, four a class."""
    return toy_images(tmp_path_factory.mktemp("images"))


def tables(folder: RunFolder | str) -> dict[str, pd.DataFrame]:
    """All rows of a run without its name and where its images were, indexed by key and sorted; fails on a key that
    occurs twice."""
    folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    found = {}
    for table, key in KEYS.items():
        rows = folder.read(table).to_pandas().drop(columns=["run", "path"], errors="ignore")
        rows = rows.astype({column: object for column in rows.columns if rows[column].dtype == "category"})
        assert not rows.duplicated(key).any(), f"{table}: a key occurs twice"
        found[table] = rows.set_index(key).sort_index()
    return found


def assert_same_rows(folder: RunFolder | str, expected: RunFolder | str, tolerance: float = 0.0) -> None:
    """Equal keys and values in all four tables; numbers to `tolerance`."""
    found, wanted = tables(folder), tables(expected)
    for table in KEYS:
        pd.testing.assert_frame_equal(
            found[table], wanted[table], check_exact=not tolerance, **({"atol": tolerance} if tolerance else {})
        )

"""Fixtures of the engine's tests: one small Ray cluster for all of them, and comparisons of whole run folders."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
    """A head node with two CPUs and no GPU; tests add and remove nodes of their own. The driver is this process."""
    folder = tempfile.mkdtemp(prefix="xb-")
    faults = Path(folder) / "faults"
    faults.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv(FAULTS, str(faults))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False},
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
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve toy images, four a class."""
    return toy_images(tmp_path_factory.mktemp("images"))


def tables(folder: RunFolder | str) -> dict[str, pd.DataFrame]:
    """All rows of a run without its name, indexed by key and sorted; fails on a key that occurs twice."""
    folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    found = {}
    for table, key in KEYS.items():
        rows = folder.read(table).to_pandas().drop(columns="run")
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

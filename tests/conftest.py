"""Fixtures: the golden files of the small model, and the development folder beside the checkout where there is one."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.engine_cluster", "tests.run_folders", "tests.report_pages"]


def pytest_collection_finish() -> None:
    """What imports and collection made stays: no garbage collection looks at it again (statsmodels' Holm collects at
    every call, half a second each in a process this large)."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The engine's tests, which mostly wait, share a cluster: under xdist one worker runs them all, from the start."""
    engine = [item for item in items if "cluster" in getattr(item, "fixturenames", ()) or "test_engine" in item.nodeid]
    for item in engine:
        item.add_marker(pytest.mark.xdist_group("engine"))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development folder beside the checkout (golden numbers on real X-rays, checkpoints, images)."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("needs the development folder ../shared (real X-rays and checkpoints)")
    return folder


@pytest.fixture(scope="session")
def golden_small() -> Path:
    """Folder of the golden numbers that ship with the tests."""
    return Path(__file__).parent / "golden"

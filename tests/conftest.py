"""Fixtures: the golden files of the small model, and the development folder beside the checkout where there is one."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.engine_cluster", "tests.run_folders", "tests.report_pages"]


def pytest_collection_finish() -> None:
    """What imports and collection made stays: no garbage collection looks at it again (statsmodels' Holm collects at
    every call, half a second each in a process this large)."""
    gc.freeze()


_OWN_CLUSTER = ("chaos", "job_submit", "manifests", "own_cluster", "privacy", "scale")
"""Tests of the engine that do without the shared cluster: any process may run them."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under xdist one worker runs the engine's tests, which mostly wait and share a cluster, the others the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class EngineApart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            own = nodeid.startswith(tuple(f"tests/test_engine_{name}" for name in _OWN_CLUSTER))
            return "engine" if nodeid.startswith("tests/test_engine_") and not own else nodeid

    return EngineApart(config, log)


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

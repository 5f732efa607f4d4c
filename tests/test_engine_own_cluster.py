"""A cluster of this machine's own: a folder that nobody else removes while it lives, and an environment that is left as
it was."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.engine_cluster import ROOT
from xaibatch.cluster import connect
from xaibatch.cluster.connect import connected
from xaibatch.config import EngineConfig

HOLD = """
import sys
from xaibatch.cluster.connect import _private_folder
with _private_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""

TWICE = """
import os
import ray
from xaibatch.cluster.connect import connected
from xaibatch.config import EngineConfig
for number in (1, 2):
    with connected(EngineConfig()):
        assert ray.get(ray.remote(lambda: number).options(num_cpus=0).remote()) == number
    left = {name for name in os.environ if name.startswith("RAY_")}
    assert left <= {"RAY_CLIENT_MODE"}, left  # which the import of Ray itself sets
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(connect, "_place", lambda: str(tmp_path))
    return tmp_path


def test_only_a_dead_process_s_folder_is_removed(place: Path) -> None:
    """Whatever its pid says here: the lock is the kernel's. Other folders and files are left alone."""
    code = f"from xaibatch.cluster import connect; connect._place = lambda: {str(place)!r}\n{HOLD}"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        folder = Path(holder.stdout.readline().strip())
        assert folder.parent == place
        (place / "other").mkdir()
        connect._remove_orphans()
        assert folder.exists()
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    assert folder.exists()
    connect._remove_orphans()
    assert not folder.exists() and (place / "other").exists()


def test_a_folder_lost_before_it_was_locked_is_made_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = connect.fcntl.flock, []

    def slow(handle: int, how: int) -> None:
        if not made:
            made.extend(place.iterdir())
            made[0].rmdir()
        real(handle, how)

    monkeypatch.setattr(connect.fcntl, "flock", slow)
    with connect._private_folder() as folder:
        assert Path(folder).is_dir() and Path(folder) != made[0]
    assert not list(place.iterdir())


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Ray finds its settings and a token in it while the cluster lives."""
    seen: dict[str, str] = {}
    for name in (*connect._TOKEN_SETTINGS, "RAY_USAGE_STATS_ENABLED", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: seen.update(os.environ))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    before: dict[str, Any] = dict(os.environ)
    with connected(EngineConfig()):
        assert len(seen["RAY_AUTH_TOKEN"]) == 64 and seen["RAY_USAGE_STATS_ENABLED"] == "0"
    assert dict(os.environ) == before


def test_one_process_starts_two_clusters_in_turn() -> None:
    """As calibration and run do."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", TWICE], cwd=ROOT, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

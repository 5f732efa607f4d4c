"""A cluster of this machine's own: a folder that nobody else removes while it lives, and an environment that is left as
it was."""

import os
import signal
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
from xaibatch.pipeline.stopping import Interrupted

HOLD = """
import sys
from xaibatch.cluster.connect import _private_folder
with _private_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""

TWICE = """
import os
import signal
import ray
from xaibatch.cluster.connect import connected
from xaibatch.config import EngineConfig
from xaibatch.pipeline.stopping import StopFlag
from ray.cluster_utils import Cluster

class Actor:
    def answer(self, number):
        return number

def ask(number):
    assert ray.get(ray.remote(Actor).options(num_cpus=0).remote().answer.remote(number)) == number

for number in (1, 2):  # Ray's own handlers would end the process, one way or another
    with StopFlag() as stop:
        with connected(EngineConfig()):
            ask(number)
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(address=made.address, log_to_driver=False)
ask(3)
ray.shutdown()
made.shutdown()
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


def test_the_environment_is_left_as_it_was_but_for_the_token(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
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
    assert dict(os.environ) == before | {"RAY_AUTH_TOKEN": seen["RAY_AUTH_TOKEN"]}
    monkeypatch.delenv("RAY_AUTH_TOKEN")


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_signal_while_ray_starts_is_none_of_ray_s(
    place: Path, monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    def init(**options: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), connected(EngineConfig(address=address)):
        pytest.fail("the cluster was taken for started")
    assert signal.getsignal(signal.SIGTERM) == before and not list(place.iterdir())


def test_one_process_uses_several_clusters_in_turn() -> None:
    """As calibration and run do; and then one that was started otherwise, with the process's environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", TWICE], cwd=ROOT, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

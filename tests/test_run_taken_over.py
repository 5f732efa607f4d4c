"""A run whose folder another one took over in its middle stops, with and without Ray."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.engine_cluster import assert_same_rows
from tests.run_folders import SHARDS, config, run
from tests.toy import Watch
from xaibatch.cluster.driver import run_on_ray
from xaibatch.errors import EngineError
from xaibatch.pipeline import session_record
from xaibatch.pipeline.run import evaluate
from xaibatch.results.lock import LOCK
from xaibatch.results.parts import RECORD, RunFolder


def test_a_run_that_lost_its_folder_stops(
    data: Path, weights: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host's run takes over in the middle: no further shard is begun, and the record, now the other's, stays
    as it is."""
    output = tmp_path / "run"

    class Robbed(Watch):
        def done(self, report: Any) -> None:
            super().done(report)
            if len(self.reports) == 2:
                lock = locks[0]
                now = lock._me.heartbeat
                other = {"token": "t", "host": "elsewhere/1/2", "pid": 1, "process_started": "9"}
                with lock._file.guarded():
                    lock.folder.write_json({**other, "since": now, "heartbeat": now}, LOCK)
                lock._thread.join(60)

    locks: list[Any] = []

    class Watched(session_record.SessionRecord):
        def __init__(self, record: Any, folder: Any, lock: Any, watcher: Any) -> None:
            locks.append(lock)
            super().__init__(record, folder, lock, watcher, keep_s=0)

    monkeypatch.setattr("xaibatch.pipeline.run.SessionRecord", Watched)
    monkeypatch.setattr("xaibatch.pipeline.run.RunLock", quick_lock)
    watch = Robbed()
    with pytest.raises(EngineError, match="another run took over the run folder"):
        run(config(data, weights, output), watch)
    assert len(watch.reports) == 2 and watch.left, "the view ends without a last word in the folder"
    assert json.loads((output / LOCK).read_text())["host"] == "elsewhere/1/2"
    assert json.loads((output / RECORD).read_text())["sessions"][0]["state"] == "running"
    (output / LOCK).unlink()
    assert run(config(data, weights, output)).ok
    assert_same_rows(str(output), str(finished))


def test_the_ray_engine_too_stops(
    cluster: Cluster, data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver asks before each shard that it opens and whenever it looks at its replicas."""
    locks: list[Any] = []
    monkeypatch.setattr("xaibatch.pipeline.run.RunLock", lambda folder: locks.append(quick_lock(folder)) or locks[0])

    class Robbed(Watch):
        def done(self, report: Any) -> None:
            super().done(report)
            locks[0].lost = True

    watch, settings = Robbed(), {"engine__threads": 1, "engine__shards_in_flight": 1, "engine__replicas": 1}
    with pytest.raises(EngineError, match="another run took over the run folder"):
        evaluate(config(data, weights, tmp_path / "run", **settings), run_on_ray, watch)
    assert len(watch.reports) < 2 * SHARDS and watch.left
    assert json.loads((tmp_path / "run" / RECORD).read_text())["sessions"][0]["state"] == "running"


def quick_lock(folder: RunFolder) -> Any:
    from xaibatch.results.lock import RunLock

    return RunLock(folder, beat_s=0.05)

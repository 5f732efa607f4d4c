"""Storage that goes away for a while says nothing about the images: what could not be read is done later, not recorded
as broken."""

import errno
import io
import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.engine_cluster import assert_same_rows
from tests.engine_faults import blind_paths
from tests.toy import Watch, toy_config, toy_images
from xaibatch.cluster import nodes
from xaibatch.cluster.driver import run_on_ray
from xaibatch.cluster.nodes import selector
from xaibatch.cluster.tasks import _check_paths
from xaibatch.data import storage
from xaibatch.data.storage import StoreError
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.place import placed
from xaibatch.pipeline.record import job_of
from xaibatch.pipeline.run import Outcome, evaluate
from xaibatch.results.parts import RunFolder

SETTINGS: dict[str, Any] = {
    "explainers": {"tests.engine_faults:brightness": {}},
    "metrics": {"tests.engine_faults:Peak": {}, "effective_complexity": {}},
    "engine__shard_size": 1,
    "engine__threads": 1,
}


@pytest.fixture
def own_images(tmp_path: Path) -> Path:
    return toy_images(tmp_path / "images")


@pytest.fixture
def plain(own_images: Path, tmp_path: Path) -> RunFolder:
    return run(own_images, tmp_path / "plain").folder


def run(images: Path, output: Path, watch: Watch | None = None) -> Outcome:
    return evaluate(toy_config(images, output, **SETTINGS), run_local, watch or Watch())


def assert_mended(outcome: Outcome, images: Path, plain: RunFolder) -> None:
    """Nothing of the outage was recorded, and the same call does what is missing."""
    assert len(outcome.failed) == 12 * 2 and outcome.num_image_failures == 0
    assert all(cell.error.startswith("StoreError: ") for cell in outcome.failed)
    assert outcome.record["status"] != "finished"
    again = run(images, Path(outcome.folder.url))
    assert again.ok and again.record["status"] == "finished"
    assert_same_rows(again.folder, plain)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EMFILE])
def test_a_share_in_error_is_read_another_time(
    own_images: Path, tmp_path: Path, plain: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(path: str, mode: str) -> io.BufferedReader:
        raise OSError(number, os.strerror(number), path)

    class Failing(Watch):
        def start(self, *arguments: Any) -> None:
            super().start(*arguments)
            monkeypatch.setattr(storage, "open", failing, raising=False)
            monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)

    outcome = run(own_images, tmp_path / "run", Failing())
    monkeypatch.undo()
    assert_mended(outcome, own_images, plain)


@pytest.mark.parametrize("left", ["nothing", "mount point"])
def test_a_share_that_is_not_mounted_is_read_another_time(
    own_images: Path, tmp_path: Path, plain: RunFolder, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    class Unmounting(Watch):
        def start(self, *arguments: Any) -> None:
            super().start(*arguments)
            own_images.rename(tmp_path / "away")
            if left == "mount point":
                own_images.mkdir()

    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    outcome = run(own_images, tmp_path / "run", Unmounting())
    (tmp_path / "away").rename(own_images)
    assert_mended(outcome, own_images, plain)


def test_a_file_of_its_own_is_an_image_s_failure(
    own_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone or forbidden, with the others in their place: a row each."""
    forbidden = str(own_images / "covid" / "1.png")
    before = open

    def guarded(path: str, mode: str) -> Any:
        if path == forbidden:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return before(path, mode)

    class Removing(Watch):
        def start(self, *arguments: Any) -> None:
            super().start(*arguments)
            (own_images / "covid" / "0.png").unlink()
            monkeypatch.setattr(storage, "open", guarded, raising=False)

    outcome = run(own_images, tmp_path / "run", Removing())
    rows = outcome.folder.read("failures").to_pylist()
    assert not outcome.failed and sorted((row["image_id"], row["message"]) for row in rows) == [
        ("covid/0.png", "the file does not exist"),
        ("covid/1.png", "the file cannot be read: Permission denied"),
    ]


def test_a_node_that_joins_without_the_share_gets_no_work(
    cluster: Cluster,
    faults: Path,
    own_images: Path,
    tmp_path: Path,
    plain: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It joins in the middle of the run, which goes on without it and says so; no replica is started there."""
    monkeypatch.setattr(nodes, "missing_paths", blind_paths)
    (faults / "markers").touch()
    added: list[Any] = []

    class Joining(Watch):
        most = 0

        def done(self, report: Any) -> None:
            super().done(report)
            if not added:
                added.append(cluster.add_node(num_cpus=1))
                (faults / "blind").write_text(added[0].node_id)
            elif "gets no work" not in caplog.text:
                time.sleep(1.0)  # the run is not over before the node's answer, which takes a busy machine some seconds

        def replicas(self, num: int) -> None:
            super().replicas(num)
            self.most = max(self.most, num)

    watch = Joining()
    try:
        outcome = evaluate(toy_config(own_images, tmp_path / "run", **SETTINGS), run_on_ray, watch)
        task: Any = ray.remote(lambda: ray.get_runtime_context().get_node_id())
        seen = ray.get(
            [task.options(label_selector=selector([added[0].node_id]), num_cpus=0.1).remote() for _ in range(20)]
        )
    finally:
        for node in added:
            cluster.remove_node(node)
    assert outcome.ok and watch.most == 1
    assert_same_rows(outcome.folder, plain)
    assert "gets no work" in caplog.text and added[0].node_id not in seen


def test_a_task_in_the_wrong_place_says_so(own_images: Path, tmp_path: Path, plain: RunFolder) -> None:
    """Before its node has been asked: it neither reads nor writes there."""
    config = toy_config(own_images, Path(plain.url), **SETTINGS)
    job = placed(job_of(plain.read_json("run.json"), config, plain))
    assert job.paths == (str(own_images), plain.path("run.json"))
    _check_paths(job)
    own_images.rename(tmp_path / "away")
    with pytest.raises(StoreError, match="images' is missing or empty on"):
        _check_paths(job)

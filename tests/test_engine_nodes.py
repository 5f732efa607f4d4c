"""Nodes are asked before they work: one that joins is no trouble to those that do, one that cannot work gets none, and
work that has no node left is sent again."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.engine_cluster import assert_same_rows
from tests.engine_faults import broken_paths
from tests.test_engine_places import Bare, wait_for
from tests.toy import Watch, toy_config
from xaibatch.cluster import cells, nodes
from xaibatch.cluster.driver import run_on_ray
from xaibatch.cluster.nodes import NodeCheck
from xaibatch.cluster.pool import ReplicaPool
from xaibatch.errors import EngineError
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.record import job_of
from xaibatch.pipeline.run import evaluate
from xaibatch.results.parts import RunFolder

SETTINGS: dict[str, Any] = {
    "explainers": {"tests.engine_faults:brightness": {}},
    "metrics": {"tests.engine_faults:Peak": {}, "effective_complexity": {}},
    "engine__shard_size": 1,
    "engine__threads": 1,
}


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = toy_config(images, tmp_path_factory.mktemp("plain") / "run", **SETTINGS)
    return evaluate(config, run_local, Watch()).folder


@pytest.fixture(scope="module")
def job(plain: RunFolder, images: Path) -> Job:
    config = toy_config(images, Path(plain.url), **SETTINGS)
    return job_of(plain.read_json("run.json"), config, plain)


@pytest.fixture
def broken(faults: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The faults `broken` and `dying` are listened to."""
    monkeypatch.setattr(nodes, "missing_paths", broken_paths)
    return faults


def alive() -> list[Any]:
    return [node for node in ray.nodes() if node["Alive"]]


def look_until(check: NodeCheck, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, check
        check.look(alive())
        time.sleep(0.05)


@pytest.mark.parametrize("settings", [{"engine__replicas": 1}, {}], ids=["one replica", "one a node"])
def test_a_second_node_joins_a_lone_one(
    cluster: Cluster, faults: Path, images: Path, tmp_path: Path, plain: RunFolder, settings: dict[str, Any]
) -> None:
    """While the new node is asked, the first one goes on: its replica stays, and what is sent finds it."""
    (faults / "markers").touch()
    added: list[Any] = []

    class Joining(Watch):
        def __init__(self) -> None:
            super().__init__()
            self.ready_after: list[int] = []

        def done(self, report: Any) -> None:
            super().done(report)
            if not added:
                added.append(cluster.add_node(num_cpus=1))

        def replicas(self, num: int) -> None:
            super().replicas(num)
            if added:
                self.ready_after.append(num)

    watch = Joining()
    try:
        outcome = evaluate(toy_config(images, tmp_path / "run", **SETTINGS, **settings), run_on_ray, watch)
    finally:
        for node in added:
            cluster.remove_node(node)
    assert outcome.ok and 0 not in watch.ready_after
    assert_same_rows(outcome.folder, plain)


def test_a_node_that_has_answered_is_never_avoided(cluster: Cluster, job: Job) -> None:
    """A lone node is asked too; one that joins is avoided until its answer comes, the first one never."""
    (head,) = (node["NodeID"] for node in alive())
    check = NodeCheck(job=job)
    look_until(check, lambda: check.cleared)
    added = cluster.add_node(num_cpus=1)
    try:
        look_until(check, lambda: check.avoid == {added.node_id})
        assert check.cleared
        look_until(check, lambda: not check.avoid)
        assert check.cleared and not check.strands(frozenset({added.node_id}))
        assert check.strands(frozenset({added.node_id, head}))
    finally:
        cluster.remove_node(added)
    look_until(check, lambda: not check.strands(frozenset()) and check.strands(frozenset({head})))


def test_a_node_where_the_check_fails_gets_no_work(
    cluster: Cluster, broken: Path, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    """A package is missing there: no loss, and no matter of paths (the data may be in an object store)."""
    check = NodeCheck(job=replace(job, paths=()))
    look_until(check, lambda: check.cleared)
    added = cluster.add_node(num_cpus=1)
    (broken / "broken").write_text(added.node_id)
    try:
        look_until(check, lambda: "gets no work" in caplog.text)
        assert check.avoid == {added.node_id} and check.cleared
        assert "cannot run the check of its files: ModuleNotFoundError: No module named 'timm'" in caplog.text
    finally:
        cluster.remove_node(added)


def test_a_cluster_that_cannot_work_says_why(cluster: Cluster, broken: Path, job: Job) -> None:
    (broken / "broken").write_text(" ".join(node["NodeID"] for node in alive()))
    check = NodeCheck(job=job)
    with pytest.raises(EngineError, match=r"no node of the cluster can work for this run: .*No module named 'timm'"):
        look_until(check, lambda: check.cleared)


def test_a_lost_answer_is_asked_for_again(
    cluster: Cluster, broken: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends says nothing about the node, until it happens again and again."""
    switch = broken / "dying"
    switch.write_text(" ".join(node["NodeID"] for node in alive()))
    check = NodeCheck(job=job)
    look_until(check, lambda: check._num_lost.total() == 1)
    assert not check.cleared
    switch.unlink()
    look_until(check, lambda: check.cleared)
    switch.write_text(" ".join(node["NodeID"] for node in alive()))
    monkeypatch.setattr(nodes, "LOST_ANSWERS", 1)
    check = NodeCheck(job=job)
    with pytest.raises(EngineError, match="WorkerCrashedError"):
        look_until(check, lambda: check.cleared)


def test_work_without_a_node_is_sent_again(
    cluster: Cluster, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are sent to other nodes than the only one there is, as if they had been opened while it was asked and the
    others had gone since. Adapter tasks, of which one runs at a time here, wait in vain for what was sent so."""
    settings: dict[str, Any] = {
        "explainers": {"tests.engine_faults:brightness": {}, "random": {}},
        "metrics": {"effective_complexity": {}, "quantus:FaithfulnessCorrelation": {"nr_runs": 4, "subset_size": 50}},
        "data__limit": 4,
        "engine__shard_size": 1,
        "engine__threads": 1,
    }
    stranded: list[str] = []
    before = cells.explain

    class Waiting(Watch):
        num_replicas = 0

    watch = Waiting()

    def explain(sent: cells.Sent, shard: Any, slot: Any) -> cells.Explained:
        if sent.avoid:
            stranded.append(shard.name)
        return before(sent, shard, slot)

    def avoid(check: NodeCheck) -> frozenset[str]:
        return frozenset(check._good if watch.num_replicas and not stranded else ())

    plain = evaluate(toy_config(images, tmp_path / "plain", **settings), run_local, Watch())
    monkeypatch.setattr(cells, "explain", explain)
    monkeypatch.setattr(NodeCheck, "avoid", property(avoid))
    outcome = evaluate(toy_config(images, tmp_path / "run", **settings, engine__replicas=1), run_on_ray, watch)
    assert stranded and outcome.ok and not watch.failures
    assert len(watch.reports) == plain.num_cells_run
    assert_same_rows(outcome.folder, plain.folder)


def test_a_replica_without_a_node_is_started_again(cluster: Cluster, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was to keep away from a node that had not answered, which is now the only one."""
    engine = job.config.engine.model_copy(update={"replicas": 1})
    pool = ReplicaPool(job=replace(job, config=job.config.model_copy(update={"engine": engine})), actor=Bare)
    only = frozenset(node["NodeID"] for node in alive())
    try:
        with monkeypatch.context() as patch:
            patch.setattr(NodeCheck, "avoid", property(lambda check: only))
            pool.refresh()
        assert [slot.avoid for slot in pool.slots] == [only]
        wait_for(pool, 1)
        assert [slot.avoid for slot in pool.ready] == [frozenset()]
    finally:
        pool.close()

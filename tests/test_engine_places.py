"""Replicas on (pretended) GPUs: one a GPU, shares of one, nodes that join and leave, and CPU tasks that never
starve."""

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from tests.engine_cluster import assert_same_rows
from tests.engine_faults import fault, place
from tests.toy import Watch, toy_config
from xaibatch.cluster.connect import HOST_MEMORY_RETRIES, connected
from xaibatch.cluster.driver import run_on_ray
from xaibatch.cluster.pool import START_LIMIT_S, Place, ReplicaPool, places
from xaibatch.cluster.replica import Replica
from xaibatch.config import EngineConfig
from xaibatch.errors import EngineError, UsageError
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


def node(name: str, cpus: float, gpus: float = 0) -> dict[str, Any]:
    return {"NodeID": name, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "engine", "expected"),
    [
        ([node("a", 8)], {}, [("a", 0.0, 8)]),
        ([node("a", 8), node("b", 4)], {}, [("a", 0.0, 8), ("b", 0.0, 4)]),
        ([node("a", 0), node("b", 4)], {"threads": 2}, [("b", 0.0, 2)]),
        ([node("a", 8)], {"replicas": 2}, [("", 0.0, 4), ("", 0.0, 4)]),
        ([node("a", 8, 2), node("b", 8)], {}, [("a", 1.0, 1), ("a", 1.0, 1)]),
        ([node("a", 8, 2)], {"device": "cpu"}, [("a", 0.0, 8)]),
        ([node("a", 8, 1)], {"gpus_per_replica": 0.5}, [("a", 0.5, 1), ("a", 0.5, 1)]),
        ([node("a", 8, 3)], {"gpus_per_replica": 2}, [("a", 2.0, 1)]),
        ([node("a", 8)], {"device": "cuda"}, [("", 1.0, 1)]),
        ([node("a", 8)], {"device": "cuda", "replicas": 2}, [("", 1.0, 1), ("", 1.0, 1)]),
    ],
)
def test_places(nodes: list[Any], engine: dict[str, Any], expected: list[Any]) -> None:
    """(node, GPUs, CPU threads) of every replica; without a node, Ray (or an autoscaler) finds one."""
    found = places(nodes, EngineConfig(**engine))
    assert [(place.node_id, place.num_gpus, place.threads) for place in found] == expected
    assert len(set(found)) == len(found)


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = toy_config(images, tmp_path_factory.mktemp("plain") / "run", **SETTINGS)
    return evaluate(config, run_local, Watch()).folder


@pytest.fixture(scope="module")
def job(plain: RunFolder, images: Path) -> Job:
    config = toy_config(images, Path(plain.url), **SETTINGS, engine__device="auto")
    return job_of(plain.read_json("run.json"), config, plain)


class Bare(Replica):
    """A replica without a model: only its place matters."""

    def load(self) -> tuple[str, tuple[str, ...]]:
        return "none", ()


class OnCpu(Replica):
    """A replica whose GPU is pretended."""

    def __init__(self, job: Job, *, device: str, threads: int) -> None:
        super().__init__(job, device="cpu", threads=threads)


class Refusing(Bare):
    """Does not start on the node that the fault `refuse` names; hangs on the one that `hang` names."""

    def load(self) -> tuple[str, tuple[str, ...]]:
        if (switch := fault("refuse")) and switch.read_text() == place()[0]:
            raise ValueError("not here")
        if (switch := fault("hang")) and switch.read_text() == place()[0]:
            time.sleep(600)
        return super().load()


def wait_for(pool: ReplicaPool, num: int) -> None:
    deadline = time.monotonic() + 120
    while len(pool.ready) != num or len(pool.slots) != num:
        assert time.monotonic() < deadline, pool.slots
        pool.refresh()
        time.sleep(0.1)


def test_replicas_follow_gpus(cluster: Cluster, job: Job) -> None:
    """A node with two GPUs gets two replicas, each sees its own GPU only; a second node with one GPU joins and gets
    one; the first vanishes and takes its two with it; the head has no GPU and no replica."""
    first = cluster.add_node(num_cpus=0, num_gpus=2)
    pool = ReplicaPool(job=job, actor=Bare)
    second = None
    try:
        wait_for(pool, 2)
        assert sorted(slot.facts.visible for slot in pool.ready if slot.facts) == ["0", "1"]
        assert sorted(slot.facts.gpu_ids for slot in pool.ready if slot.facts) == [("0",), ("1",)]
        assert {slot.facts.node_id for slot in pool.ready if slot.facts} == {first.node_id}
        assert ray.available_resources().get("GPU", 0) == 0 and ray.available_resources()["CPU"] == 2
        second = cluster.add_node(num_cpus=0, num_gpus=1)
        wait_for(pool, 3)
        cluster.remove_node(first, allow_graceful=False)
        wait_for(pool, 1)
        assert {slot.facts.node_id for slot in pool.ready if slot.facts} == {second.node_id}
    finally:
        pool.close()
        if second is not None:
            cluster.remove_node(second)


def test_two_replicas_share_a_gpu(cluster: Cluster, job: Job) -> None:
    """With half a GPU each, both see the same one; a third of one is three; what does not fit is not asked for."""
    shared = cluster.add_node(num_cpus=0, num_gpus=1)
    halves = job.config.engine.model_copy(update={"gpus_per_replica": 0.5})
    config = job.config.model_copy(update={"engine": halves})
    pool = ReplicaPool(job=replace(job, config=config), actor=Bare)
    try:
        wait_for(pool, 2)
        assert [slot.facts.visible for slot in pool.ready if slot.facts] == ["0", "0"]
        assert {slot.place for slot in pool.ready} == {
            Place(node_id=shared.node_id, index=i, num_gpus=0.5, threads=1) for i in (0, 1)
        }
    finally:
        pool.close()
        cluster.remove_node(shared)


def test_nodes_come_and_go_during_a_run(
    cluster: Cluster, faults: Path, images: Path, tmp_path: Path, plain: RunFolder
) -> None:
    """A run starts on one GPU node; another joins and gets shards; the first is lost in the middle of its work. The
    run ends without a failed cell, with the rows of an undisturbed one. Meanwhile the head's two CPUs are all the
    score tasks have: they are never held up by replicas, which take none."""
    (faults / "markers").touch()
    first = cluster.add_node(num_cpus=0, num_gpus=1)
    added: list[Any] = []
    lost: list[Any] = []

    class Disturbing(Watch):
        def done(self, report: Any) -> None:
            super().done(report)
            if len(self.reports) == 3:
                added.append(cluster.add_node(num_cpus=0, num_gpus=1))

        def replicas(self, num_ready: int) -> None:
            super().replicas(num_ready)
            if num_ready == 2 and not lost:
                lost.append(cluster.remove_node(first, allow_graceful=False))

    watch = Disturbing()
    try:
        outcome = evaluate(
            toy_config(images, tmp_path / "run", **SETTINGS, engine__device="auto"),
            partial(run_on_ray, actor=OnCpu),
            watch,
        )
    finally:
        for one in added if lost else [first, *added]:
            cluster.remove_node(one)
    assert outcome.ok and not watch.failures
    assert_same_rows(outcome.folder, plain)


def test_a_gpu_without_cuda_is_refused(cluster: Cluster, job: Job) -> None:
    """A replica that counts on a GPU does not compute on the CPU in silence."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    node = cluster.add_node(num_cpus=0, num_gpus=1)
    pool = ReplicaPool(job=job)
    try:
        with pytest.raises(EngineError, match=r"could be started: .*PyTorch finds no CUDA.*engine\.device=cpu"):
            wait_for(pool, 1)
    finally:
        pool.close()
        cluster.remove_node(node)


@pytest.mark.parametrize("kind", ["refuse", "hang"])
def test_a_place_where_no_replica_starts_rests(
    cluster: Cluster,
    faults: Path,
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """After some attempts it is said so, the other place goes on, and later it is tried again. A model that is not
    loaded in time counts as one that cannot be."""
    monkeypatch.setattr("xaibatch.cluster.pool.START_ATTEMPTS", 1)
    if kind == "hang":
        monkeypatch.setattr("xaibatch.cluster.pool.START_LIMIT_S", 5.0)
    monkeypatch.setattr("xaibatch.cluster.pool.REST_S", 1.0)
    node = cluster.add_node(num_cpus=0, num_gpus=1)
    other = cluster.add_node(num_cpus=0, num_gpus=1)
    (faults / kind).write_text(node.node_id)
    pool = ReplicaPool(job=job, actor=Refusing)
    try:
        deadline = time.monotonic() + 120
        while "the place is tried again" not in caplog.text:
            assert time.monotonic() < deadline, pool.slots
            pool.refresh()
            time.sleep(0.1)
        why = "ValueError: not here" if kind == "refuse" else "the model was not loaded after"
        assert f"no model replica starts: {why}" in caplog.text and f"node {node.node_id[:8]}" in caplog.text
        (faults / kind).unlink()
        monkeypatch.setattr("xaibatch.cluster.pool.START_LIMIT_S", START_LIMIT_S)  # a busy machine loads slowly
        wait_for(pool, 2)
        assert {slot.node_id for slot in pool.ready} == {node.node_id, other.node_id}
    finally:
        pool.close()
        cluster.remove_node(node)
        cluster.remove_node(other)


def test_ray_s_own_retries_for_full_memory_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one a task that needs more than its machine has would be started for ever; one's own limit holds."""
    setting = "RAY_task_oom_retries"
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.delenv(setting, raising=False)
    with connected(EngineConfig()):
        assert os.environ[setting] == str(HOST_MEMORY_RETRIES)
    assert setting not in os.environ
    monkeypatch.setenv(setting, "2")
    with connected(EngineConfig()):
        assert os.environ[setting] == "2"
    assert os.environ[setting] == "2"


def test_addresses_that_cannot_be_joined_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with (
        pytest.raises(UsageError, match=r"Ray Client address.*use `ray job submit"),
        connected(EngineConfig(address="ray://head:10001")),
    ):
        pass

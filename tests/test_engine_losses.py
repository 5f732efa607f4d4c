"""Which losses count against whom: a sick device is left, a node that dies is nobody's fault, a suspect waits for a
replica of its own without holding up the others."""

import errno
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError, NodeDiedError, ObjectLostError, RayTaskError, WorkerCrashedError

from tests.engine_cluster import assert_same_rows
from tests.toy import Watch, toy_config
from xaibatch.cluster import driver as driving
from xaibatch.cluster.driver import NODE_LOSSES, run_on_ray
from xaibatch.cluster.losses import describe, is_loss
from xaibatch.cluster.pool import Place, ReplicaPool, Slot
from xaibatch.cluster.replica import Replica, ReplicaFacts
from xaibatch.errors import EngineError, UnknownNameError
from xaibatch.pipeline.device import is_device_lost
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.record import job_of
from xaibatch.pipeline.run import evaluate
from xaibatch.pipeline.stopping import StopFlag
from xaibatch.pipeline.work import EXPLAIN, ShardWork
from xaibatch.results.parts import RunFolder
from xaibatch.types import Shard

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


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("No CUDA GPUs are available"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error: quoted by somebody else"), False),
    ],
)
def test_device_errors(error: Exception, lost: bool) -> None:
    assert is_device_lost(error) == lost


class AwkwardError(Exception):
    """An error of a plug-in that can be pickled and not unpickled."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


class StubbornError(Exception):
    """One that cannot even be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("not me")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (partial(UnknownNameError, "explainer", "lume", ["lime"]), "UnknownNameError: unknown explainer 'lume'."),
        (partial(AwkwardError, "no weights", "offline"), "AwkwardError: no weights: offline"),
        (partial(StubbornError, "no weights"), "StubbornError: no weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*isn't serializable")
def test_a_step_s_own_error_is_no_loss(cluster: Cluster, make: Any, text: str) -> None:
    """A plug-in that a worker does not have is not taken for a process that was killed, however its error travels."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        ray.get(ray.remote(_raise).options(num_cpus=0).remote(make))
    assert not is_loss(caught.value) and text in describe(caught.value)


def _raise(make: Any) -> None:
    raise make()


def test_what_ray_says_of_a_process_is_a_loss() -> None:
    for error in (WorkerCrashedError(), ActorDiedError(), NodeDiedError("gone"), ObjectLostError("", None, "")):
        assert is_loss(error) and is_loss(RayTaskError("f", "", error))


def test_a_device_error_in_an_explainer_is_no_row(faults: Path, images: Path, tmp_path: Path, plain: RunFolder) -> None:
    """Without Ray there is no other process to go on in: the run ends at once, and the next call does the rest."""

    class Sick(Watch):
        def done(self, report: Any) -> None:
            super().done(report)
            if len(self.reports) == 5:
                (faults / "sick").write_text("here")

    config, watch = toy_config(images, tmp_path / "run", **SETTINGS), Sick()
    with pytest.raises(EngineError, match=r"until this process ends \(CUDA error.*\): the same command goes on"):
        evaluate(config, run_local, watch)
    assert len(watch.reports) == 3 * 2 and not watch.failures
    (faults / "sick").unlink()
    again = evaluate(config, run_local, Watch())
    assert again.ok and again.num_cells_run == 9 * 2
    assert_same_rows(again.folder, plain)


def test_a_device_error_in_a_metric_of_another_package_is_no_row(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantus makes a row of any error that the model raises."""
    settings = {"explainers": {"random": {}}, "metrics": {"quantus:FaithfulnessCorrelation": {"nr_runs": 2}}}

    def lost(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more lines")

    monkeypatch.setattr("xaibatch.pipeline.local.Session.forward", lost)
    with pytest.raises(EngineError, match=r"\(CUDA error: an illegal memory access was encountered\)"):
        evaluate(toy_config(images, tmp_path / "run", **settings), run_local, Watch())


def test_a_sick_device_is_left(
    cluster: Cluster,
    faults: Path,
    images: Path,
    tmp_path: Path,
    plain: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two replicas, of which one finds its device in error at every shard, dies of it and is always free again: it gets
    no more shards after a while, and every row comes from the other."""
    monkeypatch.setattr("xaibatch.cluster.pool.LOSSES", 1)  # the other one is through before the third
    node = cluster.add_node(num_cpus=1)
    (faults / "sick").write_text(node.node_id)
    seen = 0

    class Waiting(Watch):
        """Both replicas are there before the first shard."""

        def replicas(self, num: int) -> None:
            nonlocal seen
            super().replicas(num)
            seen = max(seen, num)

    ready = ReplicaPool.ready.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(
        ReplicaPool, "ready", property(lambda pool: ready(pool) if seen == 2 or len(ready(pool)) == 2 else [])
    )
    try:
        outcome = evaluate(toy_config(images, tmp_path / "run", **SETTINGS), run_on_ray, Waiting())
    finally:
        cluster.remove_node(node)
    assert outcome.ok and seen == 2
    assert_same_rows(outcome.folder, plain)
    assert f"losses of the model replica in a row: 1 (on node {node.node_id[:8]}" in caplog.text


class Pool(SimpleNamespace):
    """Two ready replicas that nobody is behind."""

    def __init__(self) -> None:
        facts = partial(ReplicaFacts, pid=1, device="cpu", gpu_ids=(), visible=None, segmentations=())
        self.slots = [
            Slot(
                place=Place(node_id=name, index=0, num_gpus=0, threads=1),
                handle=None,
                starting=None,
                process=None,
                facts=facts(node_id=name),
            )
            for name in "ab"
        ]
        self.ready, self.avoid, self.dead, self.judged = self.slots, frozenset(), set[str](), list[bool]()
        self.num_starting = 0

    def has_lost_its_node(self, slot: Slot) -> bool:
        return slot.node_id in self.dead

    def judge(self, slot: Slot, *, lost: bool, opened: float) -> None:
        self.judged.append(lost)

    def close(self) -> None:
        pass


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def driver(
    cluster: Cluster, plain: RunFolder, images: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """A driver whose shards are opened and nothing else; twenty fresh ones."""
    config = toy_config(images, Path(plain.url), **SETTINGS)
    job = job_of(plain.read_json("run.json"), config, plain)
    work = [ShardWork(shard=Shard(index=i, records=()), explain=True, groups=()) for i in range(20)]
    made = driving._Driver(job, work, Watch(), StopFlag(), cast(ReplicaPool, pool))

    def opened(shard: Any, slot: Slot) -> None:
        shard.slot, slot.exclusive = slot, shard.alone
        slot.num_open += 1

    monkeypatch.setattr(made, "_open", opened)
    monkeypatch.setattr(driving, "FIRST_PAUSE_S", 0.0)
    yield made
    made.close()


def close(driver: Any, shard: Any, error: Exception) -> None:
    shard.errors = {EXPLAIN: error}
    driver._close(shard)


def suspect(driver: Any) -> Any:
    shard = driver._upcoming()
    driver._take(shard)
    shard.alone = True
    driver._again.append(shard)
    return shard


def test_a_suspect_holds_up_one_replica_only(driver: Any, pool: Pool) -> None:
    """Both replicas are busy and a shard wants one of its own: the one with less to do is not given anything more,
    until it is empty; the other one goes on."""
    driver._admit()
    assert [slot.num_open for slot in pool.slots] == [2, 2]
    shard = suspect(driver)
    pool.slots[0].num_open = pool.slots[1].num_open = 1
    driver._admit()
    kept, other = sorted(pool.slots, key=lambda slot: slot.num_open)
    assert (kept.num_open, other.num_open) == (1, 2)
    kept.num_open, other.num_open = 0, 1
    driver._admit()
    assert shard.slot is kept and kept.exclusive and (kept.num_open, other.num_open) == (1, 2)
    another = suspect(driver)
    other.num_open = 1
    driver._admit()
    assert another.slot is None and other.num_open == 2


def test_a_shard_is_not_given_to_the_replica_that_it_was_lost_on(driver: Any, pool: Pool) -> None:
    first, second = pool.slots
    second.num_open = 1
    shard = suspect(driver)
    shard.lost_in.add(first.place)
    driver._admit()
    assert shard.slot is None and first.num_open == 2
    second.num_open = 0
    driver._admit()
    assert shard.slot is second
    shard.slot, second.num_open, second.exclusive = None, 0, False
    shard.lost_in.add(second.place)
    first.num_open = 0
    driver._again.append(shard)
    driver._admit()
    assert shard.slot is first, "there is no other one"


def test_the_last_shards_wait_for_replicas_that_start(driver: Any, pool: Pool) -> None:
    """The first replica to be ready queues a second shard only if there is one for every other replica besides."""
    first, second = pool.slots
    pool.ready, pool.num_starting = [first], 1
    while driver._num_fresh > 2:
        driver._take(driver._upcoming())
    driver._admit()
    assert first.num_open == 1 and driver._num_fresh == 1, "the last one is for the other replica"
    pool.ready, pool.num_starting = [first, second], 0
    driver._admit()
    assert (first.num_open, second.num_open, driver._num_fresh) == (1, 1, 0)


def test_what_goes_with_its_node_is_no_suspicion(driver: Any, pool: Pool) -> None:
    """A spot machine taken back costs neither an attempt nor a turn alone, and the replica no reputation; the third
    time to the same shard it may be the shard."""
    shard = driver._upcoming()
    driver._take(shard)
    for number in range(NODE_LOSSES):
        slot = pool.slots[number % 2]
        slot.num_open, shard.slot = 1, slot
        pool.dead = {slot.node_id}
        close(driver, shard, NodeDiedError("gone") if number == 0 else ActorDiedError())
        last = number == NODE_LOSSES - 1
        assert shard.alone == last and not shard.attempts and bool(shard.lost_in) == last
    assert pool.judged == [False, True], "the first was a CPU task's, the second nobody's"


def test_a_process_that_dies_on_a_living_node_is_suspicious(driver: Any, pool: Pool) -> None:
    shard = driver._upcoming()
    driver._take(shard)
    for error, lost_on in ((WorkerCrashedError(), 0), (ActorDiedError(), 1)):
        shard.slot = pool.slots[0]
        close(driver, shard, error)
        assert shard.alone and len(shard.lost_in) == lost_on
    assert pool.judged == [False, True] and shard.attempts[EXPLAIN] == 1


def test_an_error_of_the_progress_is_no_cell_s(driver: Any, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell has its part and is not done again; whoever watches hears of his own error."""

    def full(report: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shard, ref = driver._upcoming(), ray.put("a report")
    driver._take(shard)
    shard.slot = pool.slots[0]
    driver._watch(ref, shard, EXPLAIN)
    monkeypatch.setattr(driver._progress, "done", full)
    with pytest.raises(OSError, match="No space left"):
        driver._settle([ref])
    assert not shard.errors and not shard.left


def test_losses_together_count_once_and_the_last_replica_stays(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    pool = ReplicaPool(job=job, actor=Replica)
    pool.slots = Pool().slots
    pool._check._looked = True
    sick, well = pool.slots
    for _ in range(4):
        pool.judge(sick, lost=True, opened=0.0)
    assert sick.num_losses == 1
    for _ in range(2):
        pool.judge(sick, lost=True, opened=sick.lost_at + 1)
    assert sick.num_losses == 3 and sick.retired and pool.ready == [well]
    assert "the place is tried again in 5 minutes" in caplog.text
    for _ in range(9):
        pool.judge(well, lost=True, opened=well.lost_at + 1)
    assert not well.retired, "there is no other one"
    pool.judge(well, lost=False, opened=0)
    assert well.num_losses == 0


@pytest.fixture
def job(plain: RunFolder, images: Path) -> Job:
    return job_of(plain.read_json("run.json"), toy_config(images, Path(plain.url), **SETTINGS), plain)

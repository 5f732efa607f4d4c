"""A job and its pending cells in, finished parts and the list of cells that were given up out: the Ray engine.

Every shard is worked on by one replica (which holds its images) and by CPU tasks beside it. A bounded number of shards
is open at a time; a shard is closed when each of its cells has its part or an error.

Attempts: a cell whose step raises an error is tried again, `max_attempts` times in all. The loss of a worker is
nobody's error: the first one is Ray's own business (`max_task_retries`), after a second one the shard is tried alone
on a replica, another one where there is one, and only what is lost there counts, so an input that kills its process is
found and its neighbours are not blamed. What goes with its node is no suspicion either (spot machines are taken back),
unless that happens to the same shard NODE_LOSSES times.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

import ray
from ray.exceptions import NodeDiedError, RayError

from xaibatch.cluster import cells
from xaibatch.cluster.connect import connected
from xaibatch.cluster.losses import describe, end_run_for, is_loss, is_node_loss, is_replica_loss, root
from xaibatch.cluster.open_shard import OpenShard
from xaibatch.cluster.pool import ReplicaPool, Slot
from xaibatch.cluster.replica import Replica
from xaibatch.cluster.telemetry import DriverMeter
from xaibatch.errors import EngineError, RunFolderError
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.place import placed
from xaibatch.pipeline.stopping import StopFlag
from xaibatch.pipeline.work import EXPLAIN, FailedCell, Progress, ShardWork

_LOG = logging.getLogger(__name__)

POLL_S: Final = 0.1
"""Seconds that the driver collects finished cells before it looks around (signals, nodes, replicas). Waiting for all
open cells with a limit costs one call however many of them end; waiting for the next one would cost a call for
each."""

TELL_S: Final = 5.0
"""Seconds after which progress is told again though nothing has changed."""

WARN_S: Final = 60.0
"""Seconds without a replica after which it is said what the run waits for."""

FIRST_PAUSE_S: Final = 0.5
"""Pause before a failed shard's second attempt; doubles with every further one."""

NODE_LOSSES: Final = 3
"""Nodes that a shard may lose before it is suspected of ending them."""


def run_on_ray(
    job: Job, work: Sequence[ShardWork], progress: Progress, *, actor: type[Replica] = Replica
) -> list[FailedCell]:
    """Do the work on the cluster that `job.config.engine` names; returns the cells that were given up. `actor` is what
    answers for the model.

    Raises EngineError if the cluster cannot be joined, no replica starts, a node does not see the run's files or parts
    cannot be written; ChangedWeightsError if a replica or task that starts finds another checkpoint than the run began
    with; StoppedError after SIGINT or SIGTERM. What is finished stays; the same call on what is still pending goes on.
    """
    with StopFlag() as stop, connected(job.config.engine):
        job = placed(job)
        driver = _Driver(job, work, progress, stop, ReplicaPool(job=job, actor=actor))
        try:
            return driver.run()
        except RayError as error:
            raise EngineError(
                f"the cluster was lost ({describe(error)}): the same command goes on where this run ended"
            ) from error
        finally:
            driver.close()


class _Driver:
    """The loop. Cells are known by the reference to their report."""

    def __init__(
        self, job: Job, work: Sequence[ShardWork], progress: Progress, stop: StopFlag, pool: ReplicaPool
    ) -> None:
        self._job, self._progress, self._stop, self._pool = job, progress, stop, pool
        self._engine = job.config.engine
        self._job_ref = ray.put(job)
        self._sent = cells.Sent(job=self._job_ref)
        self._fresh, self._num_fresh = iter(work), len(work)
        self._next: OpenShard | None = None
        self._again: deque[OpenShard] = deque()
        self._cells: dict[Any, tuple[OpenShard, str]] = {}
        self._adapters_waiting: deque[tuple[OpenShard, MetricGroup, bool]] = deque()
        self._num_adapters = 0
        self._num_ready = 0
        self._told = self._waiting_since = time.monotonic()
        self._failed: list[FailedCell] = []
        self._meter = DriverMeter(job.run)

    def run(self) -> list[FailedCell]:
        while True:
            self._stop.check()
            self._look_at_replicas()
            self._admit()
            if not self._cells and not self._again and self._upcoming() is None:
                return self._failed
            self._settle(self._finished())
            self._measure_queue()

    def close(self) -> None:
        """Give the devices back; whatever still runs has no one to report to.

        Nothing is cancelled, here and elsewhere: `ray.cancel` (2.60) can abort the driver's process when it meets a
        step that was just sent or is just ending.
        """
        self._pool.close()

    # -- replicas

    def _look_at_replicas(self) -> None:
        self._pool.refresh()
        if self._pool.avoid != self._sent.avoid:
            self._sent = cells.Sent(job=self._job_ref, avoid=self._pool.avoid)
        self._withdraw_stranded()
        num_ready, now = len(self._pool.ready), time.monotonic()
        if num_ready != self._num_ready or now - self._told > TELL_S:
            self._num_ready, self._told = num_ready, now
            self._progress.replicas(num_ready)
        if num_ready:
            self._waiting_since = now
        elif now - self._waiting_since > WARN_S:
            self._waiting_since = now
            _LOG.warning("no model replica is ready: %s", self._pool.waiting_for())

    def _withdraw_stranded(self) -> None:
        """Wait no longer for the steps of a shard that were kept away from every node that is left (the others went,
        these had not shown yet that they see the files): it is opened again. A step that runs after all, on a node that
        joins later, writes what another one writes."""
        lost: Any = NodeDiedError("no node is left that it was sent to")  # type: ignore[no-untyped-call]
        open_shards = {id(shard): shard for shard, _ in self._cells.values()}
        for shard in open_shards.values():
            if any(map(self._pool.strands, shard.avoids)):
                stages = [self._unwatch(ref)[1] for ref, (other, _) in list(self._cells.items()) if other is shard]
                for waiting in [waiting for waiting in self._adapters_waiting if waiting[0] is shard]:
                    self._adapters_waiting.remove(waiting)
                    shard.running -= 1
                    stages.append(waiting[1].name)
                shard.errors |= dict.fromkeys(stages, lost)
                self._close(shard)

    def _measure_queue(self) -> None:
        num_open = sum(slot.num_open for slot in self._pool.slots)
        num_cells = len(self._cells) + len(self._adapters_waiting)
        self._meter.queue(shards=num_open, cells=num_cells, replicas=self._num_ready)

    # -- opening shards

    def _admit(self) -> None:
        """Open shards up to the window, those for another attempt first, each on the replica with the fewest. For a
        shard that is tried alone one replica at a time is kept free; the others go on."""
        kept: Slot | None = None
        may_keep = not any(slot.exclusive for slot in self._pool.slots)
        for shard in self._due():
            slots = self._choices(shard, kept)
            if slots and (may_keep or not shard.alone):
                slot = min(slots, key=lambda slot: (slot.num_open, not shard.is_known_to(slot)))
                if not shard.alone or not slot.num_open:
                    self._take(shard)
                    self._open(shard, slot)
                else:
                    kept = slot
                may_keep = may_keep and not shard.alone
            elif shard is self._next:
                break
        self._start_adapters()

    def _choices(self, shard: OpenShard, kept: Slot | None) -> list[Slot]:
        """Replicas that may take the shard: not those that were lost under it, as long as there are others. The last
        fresh shards do not queue behind another one while replicas start that would work on them at once."""
        ready = self._pool.ready
        others = [slot for slot in ready if slot.place not in shard.lost_in]
        limit = self._engine.shards_in_flight if self._num_fresh > self._pool.num_starting else 1
        return [
            slot
            for slot in others or ready
            if slot is not kept and not slot.exclusive and (shard.alone or slot.num_open < limit)
        ]

    def _due(self) -> Iterator[OpenShard]:
        """Shards whose next attempt is due, then fresh ones."""
        now = time.monotonic()
        yield from [shard for shard in self._again if shard.not_before <= now]
        while (shard := self._upcoming()) is not None:
            yield shard

    def _upcoming(self) -> OpenShard | None:
        """The next fresh shard."""
        if self._next is None and (work := next(self._fresh, None)) is not None:
            self._next = OpenShard(
                work=work, groups={group.name: group for group in work.groups}, left=set(work.stages)
            )
        return self._next

    def _take(self, shard: OpenShard) -> None:
        if shard is self._next:
            self._next = None
            self._num_fresh -= 1
        else:
            self._again.remove(shard)

    def _open(self, shard: OpenShard, slot: Slot) -> None:
        shard.slot, slot.exclusive, shard.opened = slot, shard.alone, time.monotonic()
        slot.num_open += 1
        shard.errors.clear()
        shard.avoids = {self._sent.avoid}
        count = not shard.is_known_to(slot)
        if count or shard.explained is None:
            shard.explained = cells.explain(self._sent, shard.work.shard, slot)
        if EXPLAIN in shard.left:
            self._watch(cells.write(self._sent, shard.work.shard, shard.explained), shard, EXPLAIN)
            count = False
        for name in sorted(shard.left - {EXPLAIN}):
            group = shard.groups[name]
            if group.kind == "adapter":
                self._adapters_waiting.append((shard, group, count))
                shard.running += 1
            else:
                self._watch(self._score(shard, group, count), shard, name)
            count = False

    def _start_adapters(self) -> None:
        """Adapter tasks wait for a replica and hold a heavy process each: at most one for every second CPU."""
        if not self._adapters_waiting:
            return
        limit = max(1, int(ray.cluster_resources().get("CPU", 1)) // 2)  # type: ignore[no-untyped-call]
        while self._adapters_waiting and self._num_adapters < limit:
            shard, group, count = self._adapters_waiting.popleft()
            self._num_adapters += 1
            shard.running -= 1
            self._watch(self._score(shard, group, count), shard, group.name)

    def _score(self, shard: OpenShard, group: MetricGroup, count: bool) -> Any:
        assert shard.explained is not None
        shard.avoids.add(self._sent.avoid)
        return cells.score(self._job, self._sent, shard.work.shard, group, shard.explained, count)

    def _watch(self, ref: Any, shard: OpenShard, stage: str) -> None:
        self._cells[ref] = (shard, stage)
        shard.running += 1

    # -- closing cells

    def _unwatch(self, ref: Any) -> tuple[OpenShard, str]:
        shard, stage = self._cells.pop(ref)
        shard.running -= 1
        if stage in shard.groups and shard.groups[stage].kind == "adapter":
            self._num_adapters -= 1
        return shard, stage

    def _finished(self) -> list[Any]:
        if not self._cells:
            time.sleep(POLL_S)
            return []
        done: list[Any] = ray.wait(list(self._cells), num_returns=len(self._cells), timeout=POLL_S)[0]
        return done

    def _settle(self, refs: Sequence[Any]) -> None:
        for ref in refs:
            shard, stage = self._unwatch(ref)
            try:
                report = ray.get(ref)
            except Exception as error:
                end_run_for(error)
                shard.errors[stage] = error
            else:
                shard.left.discard(stage)
                self._progress.done(report)
            if not shard.running:
                self._close(shard)

    def _close(self, shard: OpenShard) -> None:
        """A shard's cells are all settled: done with it, or another attempt, or give up what has had its attempts."""
        assert shard.slot is not None
        shard.slot.num_open -= 1
        shard.slot.exclusive = False
        lost = any(map(is_loss, shard.errors.values()))
        suspect = lost and not self._went_with_a_node(shard)
        self._judge_replica(shard, suspect)
        for stage, error in shard.errors.items():
            if not is_loss(error) or (shard.alone and suspect):
                shard.attempts[stage] += 1
            if shard.attempts[stage] >= self._engine.max_attempts:
                shard.left.discard(stage)
                self._give_up(shard, stage, error)
        if lost or not self._is_good(shard.explained):
            shard.explained = None
        if shard.left:
            shard.alone = shard.alone or suspect
            tried = max(shard.attempts.values(), default=0)
            shard.not_before = time.monotonic() + FIRST_PAUSE_S * 2**tried
            self._again.append(shard)

    def _went_with_a_node(self, shard: OpenShard) -> bool:
        """Whether a node that died explains what was lost."""
        assert shard.slot is not None
        losses = [error for error in shard.errors.values() if is_loss(error)]
        if not all(map(is_node_loss, losses)) and not self._pool.has_lost_its_node(shard.slot):
            return False
        shard.num_node_losses += 1
        return shard.num_node_losses < NODE_LOSSES

    def _judge_replica(self, shard: OpenShard, suspect: bool) -> None:
        """Tell the pool how the shard fared on its replica; the next attempt prefers another one."""
        assert shard.slot is not None
        lost = any(map(is_replica_loss, shard.errors.values()))
        if lost and suspect:
            shard.lost_in.add(shard.slot.place)
        if suspect or not lost:
            self._pool.judge(shard.slot, lost=lost, opened=shard.opened)

    def _is_good(self, explained: cells.Explained | None) -> bool:
        """Whether a shard's explanations came out, so that another attempt need not make them again."""
        if explained is None:
            return False
        try:
            ray.get(list(explained.spent), timeout=0)
        except Exception:
            return False
        return True

    def _give_up(self, shard: OpenShard, stage: str, error: Exception) -> None:
        if isinstance(root(error), RunFolderError):  # no other cell would fare better
            raise EngineError(f"the results cannot be kept: {root(error)}") from None
        cell = FailedCell(shard=shard.work.shard.name, stage=stage, error=describe(error))
        self._failed.append(cell)
        self._progress.failed(cell)

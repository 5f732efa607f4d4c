"""The cluster's nodes in, ready model replicas out: started where devices are, replaced when lost, added when nodes
join.

A place is a share of a GPU on a node, or a node without GPUs. Replicas of counted places are bound to their node, so
that a node that vanishes takes its replicas with it at once; with `--replicas N` they are not bound, and Ray (or an
autoscaler that sees them waiting) finds the places. A place where no replica starts, or where replicas are lost again
and again while others fare better, rests for a while.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xaibatch.cluster.connect import ONE_THREAD
from xaibatch.cluster.losses import describe, end_run_for
from xaibatch.cluster.nodes import NodeCheck, selector
from xaibatch.cluster.replica import Replica, ReplicaFacts
from xaibatch.config import EngineConfig
from xaibatch.errors import EngineError
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.place import placed

LOOK_S: Final = 2.0
"""Seconds between looks at the cluster's nodes."""

START_ATTEMPTS: Final = 3
"""Attempts at starting a replica in one place before the place rests."""

START_LIMIT_S: Final = 1800.0
"""Seconds that a replica's process may take to load the model (a large checkpoint from a slow store takes minutes)."""

LOSSES: Final = 3
"""Losses of a replica, without a shard done in between, after which its place rests."""

REST_S: Final = 300.0
"""Seconds for which a place gets no replica."""

_LOG = logging.getLogger(__name__)

Node = Mapping[str, Any]
"""One entry of `ray.nodes()`."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Place:
    """Where a replica may run: `node_id` is empty where Ray chooses; `threads` are CPU threads of a replica on a
    CPU."""

    node_id: str
    index: int
    num_gpus: float
    threads: int


@dataclass(kw_only=True, eq=False)
class Slot:
    """A replica in its place. `facts` is None until it is ready; a `retired` one gets no new shards.

    process, begun: the reference that is there once its process is, and when that was seen.
    avoid: nodes that Ray was told to keep it away from.
    num_losses: since a shard was last done with; lost_at: the last of them.
    """

    place: Place
    handle: Any
    starting: Any
    process: Any
    avoid: frozenset[str] = frozenset()
    begun: float = float("inf")
    facts: ReplicaFacts | None = None
    retired: bool = False
    num_open: int = 0
    exclusive: bool = False
    num_losses: int = 0
    lost_at: float = float("-inf")

    @property
    def node_id(self) -> str:
        """The node it is bound to or was started on; empty where that is not known yet."""
        return self.facts.node_id if self.facts else self.place.node_id


@dataclass(kw_only=True)
class ReplicaPool:
    """Keeps one replica (an `actor`) in every place. `refresh` is cheap to call often; it looks at the nodes every
    LOOK_S seconds."""

    job: Job
    actor: type[Replica] = Replica
    slots: list[Slot] = field(default_factory=list)
    _failures: dict[Place, int] = field(default_factory=dict)
    _resting: dict[Place, float] = field(default_factory=dict)
    _looked: float = float("-inf")
    _last_error: str = ""
    _check: NodeCheck = field(init=False)

    def __post_init__(self) -> None:
        self.job = placed(self.job)
        self._check = NodeCheck(job=self.job)

    @property
    def ready(self) -> list[Slot]:
        if not self._check.cleared:
            return []
        return [slot for slot in self.slots if slot.facts is not None and not slot.retired]

    @property
    def num_starting(self) -> int:
        return sum(slot.facts is None and not slot.retired for slot in self.slots)

    @property
    def avoid(self) -> frozenset[str]:
        """Nodes that cannot work for the run, or have not shown yet that they can: nothing may run there."""
        return self._check.avoid

    def strands(self, avoid: frozenset[str]) -> bool:
        """Whether work that was sent to all nodes but these has none left, while others may do it."""
        return self._check.strands(avoid)

    def refresh(self) -> None:
        """Start, drop and retire replicas (the calls of one that is gone fail by themselves).

        Raises EngineError when no replica is ready and none can be started any more, ChangedWeightsError when one finds
        another checkpoint than the run began with.
        """
        self._settle_starting()
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        self._check.look(nodes)
        alive = {node["NodeID"] for node in nodes}
        wanted = places([node for node in nodes if node["NodeID"] not in self.avoid], self.job.config.engine)
        for slot in list(self.slots):
            gone = slot.node_id and slot.node_id not in alive
            held_up = slot.facts is None and slot.begun == float("inf") and not slot.avoid <= self.avoid
            if gone or held_up or (slot.retired and not slot.num_open):
                self.drop(slot)
            elif slot.place not in wanted:
                slot.retired = True
        taken = {slot.place for slot in self.slots}
        for place in wanted:
            if place not in taken and self._resting.get(place, self._looked) <= self._looked:
                self.slots.append(self._start(place))
        if not self.slots:  # a place that rests for its losses is better than none
            usable = [place for place in wanted if self._failures.get(place, 0) < START_ATTEMPTS]
            if wanted and not usable:
                raise EngineError(f"no model replica could be started: {self._last_error}")
            self.slots += map(self._start, usable)

    def judge(self, slot: Slot, *, lost: bool, opened: float) -> None:
        """A shard that was `opened` on a replica is closed: was the replica lost under it? Shards that were open
        together are lost together, which counts once."""
        if not lost:
            slot.num_losses = 0
        elif opened > slot.lost_at:
            slot.lost_at = time.monotonic()
            slot.num_losses += 1
            others = [other for other in self.ready if other is not slot and other.num_losses < slot.num_losses]
            if slot.num_losses >= LOSSES and others:
                slot.retired = True
                self._rest(slot.place, f"losses of the model replica in a row: {slot.num_losses}", slot.node_id)

    def has_lost_its_node(self, slot: Slot) -> bool:
        """Whether a replica went with its node, by a look at the nodes right now."""
        nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
        return slot.node_id not in {node["NodeID"] for node in nodes if node["Alive"]}

    def waiting_for(self) -> str:
        """What replicas that are not ready need, and what the cluster has free."""
        free: Any = ray.available_resources()  # type: ignore[no-untyped-call]
        needs = {f"{slot.place.num_gpus:g} GPUs" for slot in self.slots if slot.facts is None}
        return (
            f"{self.num_starting} of {len(self.slots)} are starting or wait for "
            f"{' or '.join(sorted(needs)) or 'a node'} each; free in the cluster: {free.get('GPU', 0):g} GPUs, "
            f"{free.get('CPU', 0):g} CPUs"
        )

    def drop(self, slot: Slot) -> None:
        """End a replica for good; `refresh` starts another where its place still exists."""
        if slot in self.slots:
            self.slots.remove(slot)
        ray.kill(slot.handle, no_restart=True)

    def close(self) -> None:
        for slot in list(self.slots):
            self.drop(slot)

    def _rest(self, place: Place, why: str, node_id: str) -> None:
        self._resting[place] = time.monotonic() + REST_S
        where = f"on node {node_id[:8]}, place {place.index}" if node_id else f"place {place.index}"
        _LOG.warning("%s (%s); the place is tried again in %.0f minutes", why, where, REST_S / 60)

    def _start(self, place: Place) -> Slot:
        # threads that wait must not spin: CPU tasks work on the same cores
        environment = {**dict.fromkeys(ONE_THREAD, str(place.threads)), "OMP_WAIT_POLICY": "PASSIVE"}
        avoid = frozenset() if place.node_id else self.avoid
        actor: Any = ray.remote(self.actor)
        handle = actor.options(
            num_cpus=0,
            num_gpus=place.num_gpus,
            max_restarts=-1,
            max_task_retries=1,
            allow_out_of_order_execution=True,
            scheduling_strategy=(
                NodeAffinitySchedulingStrategy(place.node_id, soft=False) if place.node_id else "SPREAD"
            ),
            label_selector=selector(avoid),
            runtime_env={"env_vars": environment},
        ).remote(self.job, device="cuda" if place.num_gpus else "cpu", threads=place.threads)
        process = handle.process.remote()
        return Slot(place=place, handle=handle, starting=handle.facts.remote(process), process=process, avoid=avoid)

    def _settle_starting(self) -> None:
        starting = {slot.starting: slot for slot in self.slots if slot.facts is None}
        if not starting:
            return
        refs = [*starting, *(slot.process for slot in starting.values())]
        done = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0])
        for ref, slot in starting.items():
            error = ""
            if ref in done:
                try:
                    slot.facts = ray.get(ref)
                    self._failures.pop(slot.place, None)
                except Exception as raised:
                    end_run_for(raised)
                    error = describe(raised)
            elif slot.process in done:
                slot.begun = min(slot.begun, time.monotonic())
                if time.monotonic() - slot.begun > START_LIMIT_S:
                    error = f"the model was not loaded after {START_LIMIT_S / 60:.0f} minutes"
            if error:
                self._failed(slot, error)

    def _failed(self, slot: Slot, error: str) -> None:
        """A replica did not start."""
        self._last_error = error
        self._failures[slot.place] = self._failures.get(slot.place, 0) + 1
        if self._failures[slot.place] >= START_ATTEMPTS:
            self._rest(slot.place, f"no model replica starts: {error}", slot.node_id)
        self.drop(slot)
        self._looked = float("-inf")


def places(nodes: Sequence[Node], engine: EngineConfig) -> tuple[Place, ...]:
    """Where replicas belong, from the alive nodes: one for each GPU (or share of one), or one for each CPU node where
    the cluster has no GPU; `engine.replicas` of them wherever Ray finds room if that is set.

    >>> laptop = [{"NodeID": "a", "Resources": {"CPU": 8.0}}]
    >>> [place.threads for place in places(laptop, EngineConfig())]
    [8]
    >>> big = [{"NodeID": "a", "Resources": {"CPU": 8.0, "GPU": 2.0}}]
    >>> len(places(big, EngineConfig())), len(places(big, EngineConfig(gpus_per_replica=0.5)))
    (2, 4)
    """
    gpus = {node["NodeID"]: float(node["Resources"].get("GPU", 0)) for node in nodes}
    cpus = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in nodes}
    on_gpu = engine.device != "cpu" and (engine.device == "cuda" or any(gpus.values()))
    num_gpus = engine.gpus_per_replica if on_gpu else 0.0
    most_cpus = max(cpus.values(), default=1)
    if engine.replicas:
        busiest = -(-engine.replicas // max(1, sum(map(bool, cpus.values()))))
        threads = engine.threads or (1 if on_gpu else max(1, most_cpus // busiest))
        return tuple(Place(node_id="", index=i, num_gpus=num_gpus, threads=threads) for i in range(engine.replicas))
    if on_gpu:
        threads = engine.threads or 1
        found = tuple(
            Place(node_id=node_id, index=i, num_gpus=num_gpus, threads=threads)
            for node_id, num in sorted(gpus.items())
            for i in range(shares(num, num_gpus))
        )
        return found or (Place(node_id="", index=0, num_gpus=num_gpus, threads=threads),)
    return tuple(
        Place(node_id=node_id, index=0, num_gpus=0.0, threads=engine.threads or num)
        for node_id, num in sorted(cpus.items())
        if num
    )


def shares(num_gpus: float, per_replica: float) -> int:
    """Replicas that fit on a node: shares of one GPU do not span two.

    >>> shares(2, 1), shares(2, 0.5), shares(2, 0.4), shares(3, 2)
    (2, 4, 4, 1)
    """
    if per_replica >= 1:
        return int(num_gpus // per_replica)
    return int(num_gpus) * int(1 / per_replica + 1e-9)

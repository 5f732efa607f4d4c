"""A cluster's nodes in; out come those that cannot work for the run: they do not see its local files, or the package
does not run there.

With one machine every path is everybody's. With several, a local data folder or run folder must be a shared file
system; where it is not, images would turn up as missing and parts would be scattered. For the nodes that are there
first this is a mistake, and found out before work begins; a node that joins later gets no work until it has shown that
it sees the files.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xaibatch.cluster.connect import ONE_THREAD
from xaibatch.cluster.losses import describe, is_loss
from xaibatch.data.storage import is_away
from xaibatch.errors import EngineError
from xaibatch.pipeline.job import Job

_LOG = logging.getLogger(__name__)

_NODE_LABEL: Final = "ray.io/node-id"

LOST_ANSWERS: Final = 3
"""Answers of a node that are lost with the process that was to give them before the node gets no work."""


@dataclass(kw_only=True)
class NodeCheck:
    """Asks each node with a CPU once, alone or not; `look` never waits. Work may begin when the nodes of the first look
    that found any have answered."""

    job: Job
    _waiting: dict[str, Any] = field(default_factory=dict)
    _good: set[str] = field(default_factory=set)
    _blind: dict[str, str] = field(default_factory=dict)
    _num_lost: Counter[str] = field(default_factory=Counter)
    _first: frozenset[str] = frozenset()
    _looked: bool = False
    _worked: bool = False

    @property
    def cleared(self) -> bool:
        """Whether work can be given out: all nodes of the first look have answered (or are gone), and one of those that
        are there may work, or none is about to answer."""
        return self._looked and not self._first & self._waiting.keys() and (bool(self._good) or not self._waiting)

    @property
    def avoid(self) -> frozenset[str]:
        """Nodes that cannot work for the run, and nodes that joined later and have not answered yet; never one that
        has shown that it can."""
        return frozenset(self._blind.keys() | (self._waiting.keys() - self._first))

    def strands(self, avoid: frozenset[str]) -> bool:
        """Whether work that was sent to all nodes but these has none left, while others may do it."""
        return bool(self._good) and self._good | self._waiting.keys() | self._blind.keys() <= avoid

    def look(self, nodes: Iterable[Any]) -> None:
        """Ask new nodes and hear the answers that have come.

        Raises EngineError where a node of the first look does not see a path, and where no node has ever been able to
        work for the run.
        """
        there = {node["NodeID"]: node for node in nodes if node["Resources"].get("CPU", 0) >= 1}
        self._looked = True
        self._first = self._first or frozenset(there)
        self._good &= there.keys()
        self._blind = {node_id: why for node_id, why in self._blind.items() if node_id in there}
        self._waiting = {node_id: ref for node_id, ref in self._waiting.items() if node_id in there}
        for node_id in there.keys() - self._good - self._blind.keys() - self._waiting.keys():
            self._waiting[node_id] = self._ask(node_id)
        for node_id, ref in list(self._waiting.items()):
            if ray.wait([ref], timeout=0)[0]:
                del self._waiting[node_id]
                self._hear(there[node_id], ref)
        self._worked = self._worked or bool(self._good)
        if self._blind and not self._waiting and not self._worked:
            raise EngineError(f"no node of the cluster can work for this run: {next(iter(self._blind.values()))}")

    def _ask(self, node_id: str) -> Any:
        ask: Any = ray.remote(missing_paths)
        return ask.options(
            num_cpus=0,
            max_retries=1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            runtime_env={"env_vars": dict(ONE_THREAD)},
        ).remote(self.job.paths)

    def _hear(self, node: Any, ref: Any) -> None:
        node_id, name = node["NodeID"], f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        try:
            missing = ray.get(ref)
        except Exception as error:
            self._num_lost[node_id] += is_loss(error)
            if is_loss(error) and self._num_lost[node_id] < LOST_ANSWERS:
                self._waiting[node_id] = self._ask(node_id)  # of no use where the node is gone
                return
            what = f"{name} cannot run the check of its files: {describe(error)}"
        else:
            if not missing:
                self._good.add(node_id)
                return
            what = f"{name} does not see {missing[0]!r}"
            if node_id in self._first:
                raise EngineError(
                    f"{what}: on several machines data, checkpoint and --output must lie on a shared file system or in "
                    "an object store (s3://...)"
                )
        self._blind[node_id] = what
        _LOG.warning("%s; it gets no work", what)


def selector(avoid: Iterable[str]) -> dict[str, str]:
    """Ray's `label_selector` of every node but these.

    >>> selector(()), selector({"b", "a"})
    ({}, {'ray.io/node-id': '!in(a,b)'})
    """
    names = ",".join(sorted(avoid))
    return {_NODE_LABEL: f"!in({names})"} if names else {}


def missing_paths(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the paths that are away on this machine."""
    return tuple(filter(is_away, paths))

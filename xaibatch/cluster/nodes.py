"""A cluster's nodes in; out come those that cannot see the run's local files.

With one machine every path is everybody's. With several, a local data folder or run folder must be a shared file
system; where it is not, images would turn up as missing and parts would be scattered. For the nodes that are there
first this is a mistake, and found out before work begins; a node that joins later gets no work until it has shown that
it sees the files.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xaibatch.cluster.connect import ONE_THREAD
from xaibatch.data.storage import is_away
from xaibatch.errors import EngineError
from xaibatch.pipeline.job import Job

_LOG = logging.getLogger(__name__)

_NODE_LABEL: Final = "ray.io/node-id"


@dataclass(kw_only=True)
class NodeCheck:
    """Asks each node once; `look` never waits. Work may begin when the nodes of the first look have answered."""

    job: Job
    _asked: dict[str, Any] = field(default_factory=dict)
    _first: tuple[str, ...] | None = None
    _blind: set[str] = field(default_factory=set)

    @property
    def cleared(self) -> bool:
        """Whether all nodes of the first look have answered (or are gone)."""
        return self._first is not None and all(self._asked.get(node_id) is None for node_id in self._first)

    @property
    def avoid(self) -> frozenset[str]:
        """Nodes that joined later and do not see the files, or have not answered yet."""
        waiting = {node_id for node_id, ref in self._asked.items() if ref is not None}
        return frozenset(self._blind | (waiting - set(self._first or ())))

    def look(self, nodes: Iterable[Any]) -> None:
        """Ask new nodes and hear the answers that have come; EngineError names a node of the first look that cannot
        see a path."""
        nodes = {node["NodeID"]: node for node in nodes if node["Resources"].get("CPU", 0) >= 1}
        if not self.job.paths or (len(nodes) < 2 and not self._asked):
            self._first = self._first or ()
            return
        ask: Any = ray.remote(missing_paths)
        for node_id in nodes.keys() - self._asked.keys():
            self._asked[node_id] = ask.options(
                num_cpus=0,
                max_retries=1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                runtime_env={"env_vars": dict(ONE_THREAD)},
            ).remote(self.job.paths)
        if self._first is None:
            self._first = tuple(self._asked)
        self._blind &= nodes.keys()
        for node_id, ref in self._asked.items():
            if node_id not in nodes:
                self._asked[node_id] = None
            elif ref is not None and ray.wait([ref], timeout=0)[0]:
                self._asked[node_id] = None
                self._hear(nodes[node_id], ref)

    def _hear(self, node: Any, ref: Any) -> None:
        try:
            missing = ray.get(ref)
        except ray.exceptions.RayError:
            return  # the node is gone again
        if not missing:
            return
        what = f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) does not see {missing[0]!r}"
        if node["NodeID"] in (self._first or ()):
            raise EngineError(
                f"{what}: on several machines data, checkpoint and --output must lie on a shared file system or in an "
                "object store (s3://...)"
            )
        self._blind.add(node["NodeID"])
        _LOG.warning("%s and gets no work", what)


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

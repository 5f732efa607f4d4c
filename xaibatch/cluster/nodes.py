"""A cluster's nodes in, a complaint out for each that cannot see the run's local files.

With one machine every path is everybody's. With several, a local data folder or run folder must be a shared file
system; where it is not, images would turn up as missing and parts would be scattered, so this is found out first.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import fsspec
import ray
from fsspec.implementations.local import LocalFileSystem
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xaibatch.cluster.connect import ONE_THREAD
from xaibatch.errors import EngineError
from xaibatch.pipeline.job import Job

_RECORD: Final = "run.json"


@dataclass(kw_only=True)
class NodeCheck:
    """Asks each node once; `look` never waits. Work may begin when the nodes of the first look have answered."""

    job: Job
    _asked: dict[str, Any] = field(default_factory=dict)
    _first: tuple[str, ...] | None = None

    @property
    def cleared(self) -> bool:
        """Whether all nodes of the first look have answered (or are gone)."""
        return self._first is not None and all(self._asked.get(node_id) is None for node_id in self._first)

    def look(self, nodes: Iterable[Any]) -> None:
        """Ask new nodes and hear the answers that have come; EngineError names a node that cannot see a path."""
        nodes = {node["NodeID"]: node for node in nodes if node["Resources"].get("CPU", 0) >= 1}
        paths = local_paths(self.job)
        if not paths or len(nodes) < 2:
            self._first = self._first or ()
            return
        ask: Any = ray.remote(_missing)
        for node_id in nodes.keys() - self._asked.keys():
            self._asked[node_id] = ask.options(
                num_cpus=0,
                max_retries=1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                runtime_env={"env_vars": dict(ONE_THREAD)},
            ).remote(paths)
        if self._first is None:
            self._first = tuple(self._asked)
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
        if missing:
            raise EngineError(
                f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) does not see {missing[0]!r}: on "
                "several machines data, checkpoint and --output must lie on a shared file system or in an object "
                "store (s3://...)"
            )


def local_paths(job: Job) -> tuple[str, ...]:
    """Absolute local paths that the driver sees and every node must see: data, checkpoint, run folder."""
    config = job.config
    named = [path for path in (config.data.path, config.model.checkpoint) if path]
    if job.folder.is_local:
        named.append(job.folder.path(_RECORD))
    found = []
    for path in named:
        filesystem, inner = fsspec.core.url_to_fs(path)
        if isinstance(filesystem, LocalFileSystem) and os.path.lexists(inner):
            found.append(inner)
    return tuple(found)


def _missing(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(path for path in paths if not os.path.lexists(path))

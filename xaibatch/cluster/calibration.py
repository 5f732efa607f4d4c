"""A sample of a run's images in, the precision of every label out, measured on a replica of the cluster.

The replica is of the run's own kind (its GPU, or a CPU), since what bfloat16 costs and gains depends on it.
"""

import time
from typing import Any

import ray

from xaibatch.cluster.connect import connected
from xaibatch.cluster.driver import POLL_S
from xaibatch.cluster.pool import ReplicaPool
from xaibatch.pipeline.job import Job
from xaibatch.types import Shard


def calibrate_on_ray(job: Job, shard: Shard) -> dict[str, Any]:
    """Let the first replica that is ready compare precisions on `shard`; raises EngineError if none starts."""
    with connected(job.config.engine):
        pool = ReplicaPool(job=job)
        try:
            while not pool.ready:
                pool.refresh()
                time.sleep(POLL_S)
            chosen: dict[str, Any] = ray.get(pool.ready[0].handle.calibrate.remote(shard))
            return chosen
        finally:
            pool.close()

"""A sample of a run's images in, the precision of every label out, measured on a replica of the cluster.

The replica is of the run's own kind (its GPU, or a CPU), since what bfloat16 costs and gains depends on it.
"""

import logging
import time
from typing import Any, Final

import ray
from ray.exceptions import RayError

from xaibatch.cluster.connect import connected
from xaibatch.cluster.driver import POLL_S, WARN_S
from xaibatch.cluster.losses import describe, end_run_for, is_loss, root
from xaibatch.cluster.pool import ReplicaPool, Slot
from xaibatch.cluster.replica import Replica
from xaibatch.errors import EngineError
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.stopping import StopFlag
from xaibatch.types import Shard

ATTEMPTS: Final = 2
"""Replicas that may be lost over the sample, each of which Ray has started twice, before it counts as the sample's
fault."""

_LOG = logging.getLogger(__name__)


def calibrate_on_ray(job: Job, shard: Shard, *, actor: type[Replica] = Replica) -> dict[str, Any]:
    """Let the first replica (an `actor`) that is ready compare precisions on `shard`.

    Raises EngineError if the cluster cannot be joined or is lost, or no replica starts; ChangedWeightsError if one
    finds another checkpoint than the run began with; StoppedError after SIGINT or SIGTERM; else whatever goes wrong
    with the sample, RuntimeError where its replicas are lost.
    """
    with StopFlag() as stop, connected(job.config.engine):
        pool = ReplicaPool(job=job, actor=actor)
        try:
            return _calibrated(pool, shard, stop)
        except RayError as error:
            raise EngineError(
                f"the cluster was lost ({describe(error)}): the same command goes on where this run ended"
            ) from error
        finally:
            pool.close()


def _calibrated(pool: ReplicaPool, shard: Shard, stop: StopFlag) -> dict[str, Any]:
    lost = ""
    for _ in range(ATTEMPTS):
        slot = _first_ready(pool, stop)
        ref = slot.handle.calibrate.remote(shard)
        while not ray.wait([ref], timeout=POLL_S)[0]:
            stop.check()
        try:
            chosen: dict[str, Any] = ray.get(ref)
            return chosen
        except Exception as error:
            end_run_for(error)
            if not is_loss(error):
                cause = root(error)  # of Ray's own kind where the error could not be pickled
                raise RuntimeError(describe(error)) if isinstance(cause, RayError) else cause from None
            lost = describe(error)
            pool.drop(slot)
    raise RuntimeError(f"{ATTEMPTS} replicas were lost over the sample: {lost}")


def _first_ready(pool: ReplicaPool, stop: StopFlag) -> Slot:
    """Wait for a replica, and say what for from time to time."""
    since = time.monotonic()
    while True:
        stop.check()
        pool.refresh()
        if pool.ready:
            return pool.ready[0]
        if time.monotonic() - since > WARN_S:
            since = time.monotonic()
            _LOG.warning("no model replica is ready to calibrate: %s", pool.waiting_for())
        time.sleep(POLL_S)

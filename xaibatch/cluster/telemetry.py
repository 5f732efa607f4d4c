"""Finished steps in, Ray metrics out: what a dashboard or Prometheus shows of a run while it goes on.

`ray_xaibatch_images_total` and `ray_xaibatch_forward_passes_total` are counters of each replica, so that images a
second are `rate(ray_xaibatch_images_total[1m])`; `ray_xaibatch_device_busy_share` is the share (0..1) of the last
WINDOW_S seconds in which a replica's device worked for the run, 0 while it has nothing to do;
`ray_xaibatch_shards_open`, `ray_xaibatch_cells_waiting` and `ray_xaibatch_replicas_ready` are the driver's queue.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from ray.util.metrics import Counter, Gauge

WINDOW_S: Final = 5.0
"""Seconds over which the busy share is taken."""


class ReplicaMeter:
    """The metrics of one replica, tagged with the run and the replica's process."""

    def __init__(self, run: str, replica: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._tags = {"run": run, "replica": replica}
        keys = tuple(self._tags)
        self._images = Counter("xaibatch_images", "Images explained.", keys)
        self._passes = Counter("xaibatch_forward_passes", "Images and perturbed copies put through the model.", keys)
        self._busy = Gauge("xaibatch_device_busy_share", "Share of the last window in which the device worked.", keys)
        self._clock = clock
        self._lock = threading.Lock()
        self._window = clock()
        self._busy_s = 0.0
        self._busy_since: float | None = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The device works for the time of the block."""
        with self._lock:
            self._busy_since = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._reckon(self._clock())
                self._busy_since = None

    def count(self, num_images: int, num_forward_passes: int) -> None:
        """A call has ended."""
        if num_images:
            self._images.inc(num_images, self._tags)
        if num_forward_passes:
            self._passes.inc(num_forward_passes, self._tags)

    def beat(self) -> float:
        """Set and return the busy share since the last beat; a call that goes on counts as far as it is."""
        with self._lock:
            now = self._clock()
            self._reckon(now)
            share = min(1.0, self._busy_s / max(now - self._window, 1e-9))
            self._window, self._busy_s = now, 0.0
        self._busy.set(share, self._tags)
        return share

    def beat_for_ever(self) -> None:
        """A thread's body: idle replicas are seen to be idle, and long calls to be busy."""
        while True:
            self.beat()
            time.sleep(WINDOW_S)

    def _reckon(self, now: float) -> None:
        if self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = now


class DriverMeter:
    """The queue of one run."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._open = Gauge("xaibatch_shards_open", "Shards being worked on.", ("run",))
        self._waiting = Gauge("xaibatch_cells_waiting", "Cells of open shards without a part.", ("run",))
        self._replicas = Gauge("xaibatch_replicas_ready", "Model replicas ready for work.", ("run",))

    def queue(self, *, shards: int, cells: int, replicas: int) -> None:
        self._open.set(shards, self._tags)
        self._waiting.set(cells, self._tags)
        self._replicas.set(replicas, self._tags)

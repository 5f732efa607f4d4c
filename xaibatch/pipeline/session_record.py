"""What an engine reports in, the session's entry in `run.json` out: opened before the work, kept up to date, closed.

A session that is killed has left its entry with the sums of a few seconds before. A run that lost its folder to another
one is stopped here, since it hears of everything that the engine begins.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Protocol, Self, overload

from xaibatch.errors import RunFolderError
from xaibatch.pipeline.record import ENDED, RUNNING, STOPPED, changed_code, new_session, now
from xaibatch.pipeline.work import CellReport, FailedCell, Progress, ShardWork
from xaibatch.results.lock import RunLock
from xaibatch.results.parts import RECORD, RunFolder

_LOG = logging.getLogger(__name__)

KEEP_S: Final = 15.0
"""Seconds between writes of the record: what a killed session's sums may lack."""


class Sums(Progress, Protocol):
    """A Progress that gives its sums at the end, or leaves without a trace where the folder is another run's."""

    def finish(self) -> dict[str, Any]: ...

    def leave(self) -> None: ...


class SessionRecord:
    """Context manager and Progress: passes everything on to `watcher` and keeps the last entry of `record["sessions"]`.

    Raises EngineError out of `replicas`, of the guarded work and of the end of the block when the lock is lost; neither
    record nor progress is written from then on.
    """

    def __init__(
        self,
        record: dict[str, Any],
        folder: RunFolder,
        lock: RunLock,
        watcher: Sums,
        *,
        keep_s: float = KEEP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._record, self._folder, self._lock, self._watcher = record, folder, lock, watcher
        self._keep_s, self._clock = keep_s, clock

    def __enter__(self) -> Self:
        self._started = self._kept = self._clock()
        self._session = new_session() | {"num_cells": 0, "num_images": 0, "num_forward_passes": 0}
        changed = changed_code(self._record, self._session)
        if changed:
            shown = "; ".join(f"{name}: {there} there, {now} now" for name, (there, now) in changed.items())
            _LOG.warning("this run began with other versions, its rows will be of both: %s", shown)
        self._record["status"] = RUNNING
        self._record["sessions"].append(self._session)
        self._folder.write_json(self._record, RECORD)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock.lost:
            self._watcher.leave()
        self._lock.check()
        spent = self._watcher.finish()
        self._session |= {**spent, "state": ENDED if error is None else STOPPED}
        self._update()
        self._folder.write_json(self._record, RECORD)

    def guarded(self, work: Sequence[ShardWork]) -> Sequence[ShardWork]:
        """The work, no more of which is given out once the lock is lost."""
        return _Guarded(work, self._lock)

    # -- Progress

    def done(self, report: CellReport) -> None:
        if self._lock.lost:
            return
        self._session["num_cells"] += 1
        self._session["num_images"] += report.num_images
        self._session["num_forward_passes"] += report.num_forward_passes
        self._watcher.done(report)
        self._keep()

    def failed(self, cell: FailedCell) -> None:
        if not self._lock.lost:
            self._watcher.failed(cell)

    def replicas(self, num: int) -> None:
        self._lock.check()
        self._watcher.replicas(num)
        self._keep()

    def _keep(self) -> None:
        if self._clock() - self._kept < self._keep_s:
            return
        self._kept = self._clock()
        self._update()
        with contextlib.suppress(RunFolderError):  # a full disk stops the cells, not the counting
            self._folder.impatient().write_json(self._record, RECORD)

    def _update(self) -> None:
        self._session |= {"seconds": round(self._clock() - self._started, 2), "updated": now()}


class _Guarded(Sequence[ShardWork]):
    """A list of work that asks before each item whether the run still has its folder."""

    def __init__(self, work: Sequence[ShardWork], lock: RunLock) -> None:
        self._work, self._lock = work, lock

    def __len__(self) -> int:
        return len(self._work)

    @overload
    def __getitem__(self, index: int) -> ShardWork: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardWork]: ...
    def __getitem__(self, index: int | slice) -> ShardWork | Sequence[ShardWork]:
        return self._work[index]

    def __iter__(self) -> Iterator[ShardWork]:
        for item in self._work:
            self._lock.check()
            yield item

"""Finished cells in; out come a live view on a terminal, plain lines elsewhere, `progress.json`, and where the time
went."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, Final, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from xaibatch.errors import RunFolderError
from xaibatch.pipeline.estimate import Estimate
from xaibatch.pipeline.job import Job
from xaibatch.pipeline.work import CellReport, FailedCell

PROGRESS: Final = "progress.json"

LOCAL_JSON_S: Final = 2.0
REMOTE_JSON_S: Final = 30.0
"""Seconds between writes of `progress.json`."""

_BAR_WIDTH: Final = 16
_ONE_LINE: Final = Column(no_wrap=True, overflow="ellipsis")
_CPU_STAGES: Final = ("read", "segmentation", "plan", "score", "write")


class ProgressWatcher:
    """Shows how a run gets on, and keeps the sums. What cannot be shown (a full disk, a closed pipe) is left out: the
    run and its sums go on.

    stream:      where lines and the live view go.
    live:        redraw one line (True), print a line now and then (False), or decide by whether `stream` is a terminal.
    line_s:      seconds between plain lines.
    json_s:      seconds between writes of `progress.json`; None: LOCAL_JSON_S, or REMOTE_JSON_S in an object store,
                 where each costs a request that the run waits for.
    """

    def __init__(
        self,
        *,
        stream: TextIO | None = None,
        live: bool | None = None,
        line_s: float = 10.0,
        json_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = cast(TextIO, _Lossy(stream or sys.stderr))
        self._live = Console(file=self._stream).is_interactive if live is None else live
        self._line_s, self._json_wanted_s, self._clock = line_s, json_s, clock
        self._job: Job | None = None
        self._bar: Progress | None = None

    # -- what a run tells

    def start(self, job: Job, expected: Estimate, num_cells_done: int) -> None:
        """A run begins with `expected` to do, after `num_cells_done` cells of earlier sessions."""
        self._job, self._expected, self._before = job, expected, num_cells_done
        usual_s = LOCAL_JSON_S if job.folder.is_local else REMOTE_JSON_S
        self._json_s = usual_s if self._json_wanted_s is None else self._json_wanted_s
        self._started = self._last_line = self._last_json = self._last_done = self._clock()
        self._first_replica: float | None = None
        self._num_replicas = self._most_replicas = 0
        self._replica_s = 0.0
        self._counted_until = self._started
        self._cells = self._images = self._passes = self._image_failures = 0
        self._failed: list[FailedCell] = []
        self._seconds = dict.fromkeys(("model", *_CPU_STAGES), 0.0)
        about = f", about {duration(expected.seconds)}" if expected.seconds and not expected.uncounted else ""
        before = f" ({num_cells_done:,} cells are done already)" if num_cells_done else ""
        uncounted = f"; not counted: {', '.join(expected.uncounted)}" if expected.uncounted else ""
        self._say(
            f"{job.run}: {expected.num_images:,} images, {expected.num_cells:,} cells, about "
            f"{expected.num_forward_passes:,} forward passes{about}{before}{uncounted}"
        )
        if self._live:
            self._bar = Progress(
                BarColumn(_BAR_WIDTH),
                TextColumn("{task.completed:,}/{task.total:,} cells, {task.fields[state]}", table_column=_ONE_LINE),
                console=Console(file=self._stream),
            )
            self._bar.add_task(job.run, total=expected.num_cells, state="starting")
            self._bar.start()
        self._write_json("running")

    def done(self, report: CellReport) -> None:
        """A cell has its part."""
        self._last_done = self._clock()
        self._cells += 1
        self._images += report.num_images
        self._passes += report.num_forward_passes
        self._image_failures += report.num_failures
        for what, seconds in report.seconds.items():
            self._seconds[what] = self._seconds.get(what, 0.0) + seconds
        self._show()

    def failed(self, cell: FailedCell) -> None:
        """A cell was given up."""
        self._failed.append(cell)
        self._say(f"given up: {cell.shard} {cell.stage}: {cell.error}")
        self._show()

    def replicas(self, num: int) -> None:
        """From now on `num` replicas are ready."""
        self._count_replica_seconds()
        if num and self._first_replica is None:
            self._first_replica = self._clock()
        if num != self._num_replicas and not self._live:
            self._say(f"{num} model replica{'s' if num != 1 else ''} ready")
        self._num_replicas, self._most_replicas = num, max(num, self._most_replicas)
        self._show()

    def finish(self) -> dict[str, Any]:
        """The run ends (or is stopped): say where the time went; return the sums for the run's record."""
        self._count_replica_seconds()
        self.leave()
        ended = "done" if self._cells >= self._expected.num_cells else "stopped"
        self._say(
            f"{self._cells:,} of {self._expected.num_cells:,} cells, {self._images:,} images, {self._passes:,} forward "
            f"passes in {duration(self._clock() - self._started)}" + self._failures()
        )
        self._say(self.where_the_time_went())
        self._write_json(ended)
        return self._sums()

    def leave(self) -> None:
        """The run's folder is another run's by now: end the view, write nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # -- what it shows

    def where_the_time_went(self) -> str:
        """One line: the replicas' time (model, idle) and the CPU tasks' time beside them."""
        model, available = self._seconds["model"], self._replica_s
        beside = ", ".join(f"{what} {duration(self._seconds[what])}" for what in _CPU_STAGES)
        share = f" ({model / available:.0%} of the replicas' time)" if available else ""
        idle = f", idle {duration(max(0.0, available - model))}" if available else ""
        return f"where the time went: model {duration(model)}{share}{idle}; beside it: {beside}"

    def _show(self) -> None:
        now = self._clock()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._cells + len(self._failed), state=self._state())
        elif now - self._last_line >= self._line_s:
            self._last_line = now
            self._say(f"{self._cells:,}/{self._expected.num_cells:,} cells, {self._state()}")
        if now - self._last_json >= self._json_s:
            self._last_json = now
            self._write_json("running")

    def _state(self) -> str:
        rates = self._rates()
        left = f", {duration(rates['seconds_left'])} left" if rates["seconds_left"] is not None else ""
        replicas = f", {self._num_replicas} replica{'s' if self._num_replicas != 1 else ''}"
        return (
            f"{self._images:,} images, {rates['forward_passes_per_second']:,.0f} forward passes/s"
            f"{left}{replicas}{self._failures()}"
        )

    def _failures(self) -> str:
        cells = f", {len(self._failed):,} cells given up" if self._failed else ""
        return cells + (f", {self._image_failures:,} failures of images" if self._image_failures else "")

    def _rates(self) -> dict[str, Any]:
        """Images and forward passes per second since the first replica was ready, and seconds left."""
        seconds = self._clock() - self._first_replica if self._first_replica is not None else 0.0
        return {
            "images_per_second": self._images / seconds if seconds else 0.0,
            "forward_passes_per_second": self._passes / seconds if seconds else 0.0,
            "seconds_left": self._seconds_left(),
        }

    def _seconds_left(self) -> float | None:
        """By the larger of the two shares that are known when a cell ends: cells always, forward passes where all of
        them were counted beforehand. Until the next cell ends it counts down, as long as one takes on average."""
        total = 0 if self._expected.uncounted else self._expected.num_forward_passes
        share = max(self._cells / max(1, self._expected.num_cells), self._passes / total if total else 0.0)
        seconds = self._last_done - self._first_replica if self._first_replica is not None else 0.0
        if not self._cells or seconds <= 0:
            return None
        since = min(self._clock() - self._last_done, seconds / self._cells)
        return max(0.0, seconds / share - seconds - since)

    def _sums(self) -> dict[str, Any]:
        idle = max(0.0, self._replica_s - self._seconds["model"])
        return {
            "num_cells": self._cells,
            "num_failed_cells": len(self._failed),
            "num_images": self._images,
            "num_forward_passes": self._passes,
            "num_replicas": self._most_replicas,
            "seconds_by_stage": {what: round(s, 3) for what, s in {**self._seconds, "idle": idle}.items()},
        }

    def _count_replica_seconds(self) -> None:
        now = self._clock()
        self._replica_s += self._num_replicas * (now - self._counted_until)
        self._counted_until = now

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=self._stream, flush=True)

    def _write_json(self, state: str) -> None:
        assert self._job is not None
        self._count_replica_seconds()
        content = {
            "run": self._job.run,
            "state": state,
            "updated": time.time(),
            "elapsed_seconds": self._clock() - self._started,
            "num_cells_expected": self._expected.num_cells,
            "num_cells_done_before": self._before,
            "replicas": self._num_replicas,
            **self._rates(),
            **self._sums(),
        }
        with contextlib.suppress(RunFolderError, OSError):  # a full disk stops the cells, not the counting
            self._job.folder.impatient().write_json(content, PROGRESS)


class _Lossy:
    """A text stream whose errors are ignored; the live view's own thread writes to it too."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(0.31), duration(42), duration(200), duration(8000)
    ('0.3 s', '42 s', '3 min 20 s', '2 h 13 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

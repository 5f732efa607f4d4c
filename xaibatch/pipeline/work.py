"""What both engines share: which cells are still to be done, a finished cell's report, and who is told of it; no
torch."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import Job, ShardExplanations
from xaibatch.results.compact import Depth, Listing, is_compact, list_parts
from xaibatch.results.schema import TABLES
from xaibatch.types import ImageBatch, Shard

EXPLAIN = "explain"
"""Name of the stage that predicts and explains; every other stage is a metric group's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardWork:
    """What is still to be done for one shard: its explanations' parts, and the metric groups without a part."""

    shard: Shard
    explain: bool
    groups: tuple[MetricGroup, ...]

    @property
    def num_cells(self) -> int:
        return int(self.explain) + len(self.groups)

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the cells, `explain` first."""
        return ((EXPLAIN,) if self.explain else ()) + tuple(group.name for group in self.groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class CellReport:
    """One finished cell: where its seconds went (`read`, `segmentation`, `model`, `plan`, `score`, `write`), and how
    many images went through the model for it."""

    shard: str
    stage: str
    seconds: dict[str, float] = field(default_factory=dict)
    num_forward_passes: int = 0
    num_images: int = 0
    num_failures: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedCell:
    """A cell that failed in every attempt."""

    shard: str
    stage: str
    error: str


class Progress(Protocol):
    """Told about cells as they end; draws the live view, the plain lines and the progress JSON."""

    def done(self, report: CellReport) -> None: ...

    def failed(self, cell: FailedCell) -> None: ...

    def replicas(self, num: int) -> None:
        """How many replicas are ready from now on."""


def listings(job: Job, depth: Depth) -> dict[str, Listing]:
    """The run's parts: one listing of each table, as deep as `depth`."""
    return {table: list_parts(job.folder, table, depth=depth, run_id=job.run_id) for table in TABLES}


def pending(
    job: Job,
    shards: Sequence[Shard],
    found: Callable[[str, str], None] | None = None,
    *,
    listed: Mapping[str, Listing] | None = None,
) -> list[ShardWork]:
    """The cells whose parts do not all exist yet, by shard, from `listed` or else from a listing of the names.

    `found` is told of every file in the run folder that is no part of this run: its path, and what is wrong with it.
    Where such a file bears the name of a part, its cell is pending and will write it anew; the rest is left alone.
    """
    listed = listings(job, "names") if listed is None else listed
    if found is not None:
        for table, listing in listed.items():
            parts = {**listing.readable, **listing.leftover}
            for path, problem in {**listing.problems, **_foreign(job, shards, table, parts)}.items():
                found(path, problem)
    explained = listed["maps"].present & listed["predictions"].present
    if job.run_id:  # runs of earlier versions wrote no `failures` for shards without
        explained &= listed["failures"].present
    scored = listed["scores"].present
    work = (
        ShardWork(
            shard=shard,
            explain=shard.name not in explained,
            groups=tuple(group for group in job.groups if group.part(shard) not in scored),
        )
        for shard in shards
    )
    return [shard_work for shard_work in work if shard_work.num_cells]


def _foreign(job: Job, shards: Sequence[Shard], table: str, parts: Mapping[str, str]) -> dict[str, str]:
    """Whole parts of cells that this run does not have."""
    names = (
        {group.part(shard) for group in job.groups for shard in shards}
        if table == "scores"
        else {shard.name for shard in shards}
    )
    return {
        path: "a part that this run does not have: remove it"
        for name, path in parts.items()
        if name not in names and not is_compact(name)
    }


def needs_pixels(job: Job, group: MetricGroup) -> bool:
    """Whether a metric of the group looks at the images' pixels, masks or twins."""
    needs = {need for label in group.metrics for need in job.metrics[label].needs}
    return bool(needs & {"image", "mask", "twin"})


def pixels_for(job: Job, group: MetricGroup, read: Callable[[], ImageBatch]) -> ImageBatch | None:
    """The shard's pixels, masks and twins, read only where a metric of the group needs them."""
    return read() if needs_pixels(job, group) else None


class Stopwatch:
    """Seconds and forward passes of one cell. `passes` reads a running count of them, where there is a model."""

    def __init__(self, passes: Callable[[], int] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._read = passes or (lambda: 0)
        self._start = self._read()
        self._added = 0

    @property
    def num_forward_passes(self) -> int:
        """Since this stopwatch was made, and those added."""
        return self._read() - self._start + self._added

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def add(self, seconds: Mapping[str, float], num_forward_passes: int) -> None:
        """What an earlier step of the cell cost, in another process."""
        for what, value in seconds.items():
            self.seconds[what] = self.seconds.get(what, 0.0) + value
        self._added += num_forward_passes

    def report(self, shard: Shard, stage: str, explained: ShardExplanations) -> CellReport:
        """The report of the cell that this stopwatch was started for."""
        return CellReport(
            shard=shard.name,
            stage=stage,
            seconds=self.seconds,
            num_forward_passes=self.num_forward_passes,
            num_images=len(explained.ids) if stage == EXPLAIN else 0,
            num_failures=len(explained.failures) if stage == EXPLAIN else 0,
        )

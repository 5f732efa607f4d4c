"""The plain engine: one session in this process, shard after shard; also what each cell does, step by step.

`run_local` is what runs where Ray is not installed, and the measure that the Ray engine is compared with.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from xaibatch.metrics.quantus_adapter import score_adapter
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import GroupPlan, Job, ShardExplanations
from xaibatch.pipeline.scoring import plan_group, score_group
from xaibatch.pipeline.session import Session
from xaibatch.pipeline.writing import write_explanations, write_scores
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


@dataclass(frozen=True, kw_only=True, slots=True)
class CellReport:
    """One finished cell: where its seconds went, and how many images went through the model for it."""

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


def pending(job: Job, shards: Sequence[Shard]) -> list[ShardWork]:
    """The cells whose part does not exist yet, by shard (from one listing of each table)."""
    explained, scored = set(job.folder.parts("maps")), set(job.folder.parts("scores"))
    work = (
        ShardWork(
            shard=shard,
            explain=shard.name not in explained,
            groups=tuple(group for group in job.groups if group.part(shard) not in scored),
        )
        for shard in shards
    )
    return [shard_work for shard_work in work if shard_work.num_cells]


def run_local(job: Job, work: Sequence[ShardWork], progress: Progress, *, device: str = "cpu") -> list[FailedCell]:
    """Do the work in this process, one shard after another; returns the cells that failed (nothing is raised for them)."""
    session = Session(job, device=device)
    failed: list[FailedCell] = []
    for shard_work in work:
        failed += _run_shard(session, job, shard_work, progress)
    for cell in failed:
        progress.failed(cell)
    return failed


def _run_shard(session: Session, job: Job, work: ShardWork, progress: Progress) -> list[FailedCell]:
    shard = work.shard
    clock = Stopwatch(session)
    try:
        with clock.measure("model"):
            explained = session.explain(shard)
        if work.explain:
            with clock.measure("write"):
                write_explanations(job, shard, explained)
            progress.done(clock.report(shard, EXPLAIN, explained))
    except Exception as error:
        stages = ([EXPLAIN] if work.explain else []) + [group.name for group in work.groups]
        return [FailedCell(shard=shard.name, stage=stage, error=f"{type(error).__name__}: {error}") for stage in stages]
    failed = []
    for group in work.groups:
        clock = Stopwatch(session)
        try:
            run_group(session, job, shard, group, explained, clock)
            progress.done(clock.report(shard, group.name, explained))
        except Exception as error:
            failed.append(FailedCell(shard=shard.name, stage=group.name, error=f"{type(error).__name__}: {error}"))
    return failed


def run_group(
    session: Session, job: Job, shard: Shard, group: MetricGroup, explained: ShardExplanations, clock: "Stopwatch"
) -> None:
    """Plan, answer, score and write one metric group of one shard in this process."""
    batch = pixels_for(job, group, lambda: session.hold(shard).batch)
    if group.kind == "adapter":
        with clock.measure("score"):
            scores = score_adapter(job, group, explained, session.hold(shard).batch, session)
    else:
        plan = GroupPlan(questions=())
        if group.kind != "map":
            with clock.measure("plan"):
                plan = plan_group(job, group, explained, batch)
        with clock.measure("model"):
            answers = session.answer(shard, plan, group.metrics[0])
        with clock.measure("score"):
            scores = score_group(job, group, explained, plan, answers, batch)
    with clock.measure("write"):
        write_scores(job, group, shard, explained, scores)


def pixels_for(job: Job, group: MetricGroup, read: Callable[[], ImageBatch]) -> ImageBatch | None:
    """The shard's pixels, masks and twins, read only where a metric of the group needs them."""
    needs = {need for label in group.metrics for need in job.metrics[label].needs}
    return read() if needs & {"image", "mask", "twin"} else None


class Stopwatch:
    """Seconds and forward passes of one cell."""

    def __init__(self, session: Session | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._session = session
        self._passes = session.num_forward_passes if session else 0

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def report(self, shard: Shard, stage: str, explained: ShardExplanations) -> CellReport:
        passes = self._session.num_forward_passes - self._passes if self._session else 0
        return CellReport(
            shard=shard.name,
            stage=stage,
            seconds=self.seconds,
            num_forward_passes=passes,
            num_images=len(explained.ids) if stage == EXPLAIN else 0,
            num_failures=len(explained.failures) if stage == EXPLAIN else 0,
        )

"""The plain engine: one session in this process, shard after shard; also what each cell does, step by step.

`run_local` is what runs where Ray is not installed, and the measure that the Ray engine is compared with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from xaibatch.config import EngineConfig
from xaibatch.errors import ChangedWeightsError, EngineError, RunFolderError, StoppedError
from xaibatch.pipeline.adapter import score_adapter
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.device import device_here, is_device_lost
from xaibatch.pipeline.job import GroupPlan, Job, ShardExplanations
from xaibatch.pipeline.place import placed
from xaibatch.pipeline.scoring import plan_group, score_group
from xaibatch.pipeline.session import Session
from xaibatch.pipeline.stopping import StopFlag
from xaibatch.pipeline.work import EXPLAIN, CellReport, FailedCell, Progress, ShardWork, Stopwatch, pixels_for
from xaibatch.pipeline.writing import write_explanations, write_scores
from xaibatch.seeding import DrawKey
from xaibatch.types import Shard

ValueT = TypeVar("ValueT")


def run_local(
    job: Job, work: Sequence[ShardWork], progress: Progress, *, device: str | None = None
) -> list[FailedCell]:
    """Do the work in this process, one shard after another; returns the cells that failed in each of
    `engine.max_attempts` attempts.

    Computes where `engine.device` says, unless `device` does, with `engine.threads` threads on a CPU. SIGINT and
    SIGTERM end it after the batch or cell at hand, with StoppedError. Raises EngineError where there is no such device,
    where the device is in error until this process ends, and where parts cannot be written; ChangedWeightsError where
    the checkpoint is no longer the one that the run began with.
    """
    job = placed(job)
    with _threads(job.config.engine), StopFlag() as stop:
        session = Session(job, device=device or device_here(job.config.engine))
        progress.replicas(1)
        loop = _Loop(session=session, job=job, progress=progress, check=stop.check)
        failed = [cell for shard_work in work for cell in loop.run(shard_work)]
    for cell in failed:
        progress.failed(cell)
    return failed


def calibrate_local(job: Job, shard: Shard, *, device: str | None = None) -> dict[str, Any]:
    """Choose precisions on a sample, in this process, where `run_local` would compute.

    Raises StoppedError after SIGINT or SIGTERM, EngineError for a device that is not there or in error, else whatever
    goes wrong with the sample.
    """
    from xaibatch.pipeline.calibrate import calibrate

    with _threads(job.config.engine), StopFlag() as stop:
        session = Session(placed(job), device=device or device_here(job.config.engine))
        with session.interrupted_by(stop.check):
            try:
                return calibrate(session, shard)
            except Exception as error:
                if is_device_lost(error):
                    raise _lost(error) from error
                raise


@contextmanager
def _threads(engine: EngineConfig) -> Iterator[None]:
    """PyTorch's CPU threads as configured, for the time of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(engine.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """Does one shard's cells. `check` raises StoppedError when it is time to end: asked before each step and each batch
    inside it."""

    session: Session
    job: Job
    progress: Progress
    check: Callable[[], None]

    def run(self, work: ShardWork) -> list[FailedCell]:
        """Explain and score; returns the cells that are given up."""
        shard, failed = work.shard, []
        clock = self._stopwatch()
        try:
            explained = self._tried(lambda: self._explain(shard, clock))
        except _GivenUpError as error:
            return [FailedCell(shard=shard.name, stage=stage, error=str(error)) for stage in work.stages]
        cells = {group.name: partial(self._score, shard, group, explained) for group in work.groups}
        if work.explain:
            cells = {EXPLAIN: partial(self._write, shard, explained, clock), **cells}
        for stage, cell in cells.items():
            try:
                report = self._tried(cell)
            except _GivenUpError as error:
                failed.append(FailedCell(shard=shard.name, stage=stage, error=str(error)))
            else:
                self.progress.done(report)
        return failed

    def _explain(self, shard: Shard, clock: Stopwatch) -> ShardExplanations:
        with clock.measure("read"):
            self.session.hold(shard)
        with clock.measure("model"), self.session.interrupted_by(self.check):
            return self.session.explain(shard)

    def _write(self, shard: Shard, explained: ShardExplanations, clock: Stopwatch) -> CellReport:
        with clock.measure("write"):
            write_explanations(self.job, shard, explained)
        return clock.report(shard, EXPLAIN, explained)

    def _score(self, shard: Shard, group: MetricGroup, explained: ShardExplanations) -> CellReport:
        clock = self._stopwatch()
        run_group(self.session, self.job, shard, group, explained, clock, self.check)
        return clock.report(shard, group.name, explained)

    def _stopwatch(self) -> Stopwatch:
        return Stopwatch(lambda: self.session.num_forward_passes)

    def _tried(self, step: Callable[[], ValueT]) -> ValueT:
        """What a step returns in one of `max_attempts` attempts. Raises _GivenUpError after them, or what ends the run:
        no other cell would fare better."""
        last: Exception | None = None
        for _ in range(self.job.config.engine.max_attempts):
            self.check()
            try:
                return step()
            except (StoppedError, EngineError, ChangedWeightsError):
                raise
            except Exception as error:
                if is_device_lost(error):
                    raise _lost(error) from error
                last = error
        if isinstance(last, RunFolderError):
            raise EngineError(f"the results cannot be kept: {last}") from None
        raise _GivenUpError(f"{type(last).__name__}: {last}")


class _GivenUpError(Exception):
    """A step failed in every attempt; its text is the last error's."""


def _lost(error: Exception) -> EngineError:
    """What to say about a device that only another process can use again."""
    return EngineError(
        f"the device reports an error that lasts until this process ends ({str(error).partition(chr(10))[0]}): "
        "the same command goes on where this run ended"
    )


def run_group(
    session: Session,
    job: Job,
    shard: Shard,
    group: MetricGroup,
    explained: ShardExplanations,
    clock: Stopwatch,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Plan, answer, score and write one metric group of one shard in this process; `check` is asked before each batch
    of a native metric (an adapter's package would take what it raises for an error of the image)."""
    batch = pixels_for(job, group, lambda: session.hold(shard).batch)
    if group.kind == "adapter":
        answering = _Timed(session, clock)
        with clock.measure("score"):
            scores = score_adapter(job, group, explained, session.hold(shard).batch, answering)
        if answering.lost is not None:
            raise answering.lost
        clock.seconds["score"] -= clock.seconds.get("model", 0.0)
    else:
        plan = GroupPlan(questions=())
        if group.kind != "map":
            with clock.measure("plan"):
                plan = plan_group(job, group, explained, batch)
        with clock.measure("model"), session.interrupted_by(check):
            answers = session.answer(shard, plan, group.metrics[0])
        with clock.measure("score"):
            scores = score_group(job, group, explained, plan, answers, batch)
    with clock.measure("write"):
        write_scores(job, group, shard, explained, scores)


class _Timed:
    """A session whose answers to an adapter metric are reckoned as the model's time. The metric's own package turns any
    error into rows; that the device was `lost` is none of the images' errors."""

    def __init__(self, session: Session, clock: Stopwatch) -> None:
        self._session, self._clock = session, clock
        self.lost: Exception | None = None

    def forward(self, images_BCHW: NDArray[np.floating]) -> NDArray[np.floating]:
        with self._asked():
            return self._session.forward(images_BCHW)

    def explain_images(
        self, label: str, images_BCHW: NDArray[np.floating], targets_B: Sequence[int], keys: Sequence[DrawKey]
    ) -> list[NDArray[np.floating]]:
        with self._asked():
            return self._session.explain_images(label, images_BCHW, targets_B, keys)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        with self._clock.measure("model"):
            try:
                yield
            except Exception as error:
                if is_device_lost(error):
                    self.lost = error
                raise

"""The plain engine: one session in this process, shard after shard; also what each cell does, step by step.

`run_local` is what runs where Ray is not installed, and the measure that the Ray engine is compared with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xaibatch.config import EngineConfig
from xaibatch.errors import StoppedError
from xaibatch.pipeline.adapter import score_adapter
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.device import device_here
from xaibatch.pipeline.job import GroupPlan, Job, ShardExplanations
from xaibatch.pipeline.place import placed
from xaibatch.pipeline.scoring import plan_group, score_group
from xaibatch.pipeline.session import Session
from xaibatch.pipeline.stopping import StopFlag
from xaibatch.pipeline.work import EXPLAIN, FailedCell, Progress, ShardWork, Stopwatch, pixels_for
from xaibatch.pipeline.writing import write_explanations, write_scores
from xaibatch.seeding import DrawKey
from xaibatch.types import Shard


def run_local(
    job: Job, work: Sequence[ShardWork], progress: Progress, *, device: str | None = None
) -> list[FailedCell]:
    """Do the work in this process, one shard after another; returns the cells that failed (they raise nothing).

    Computes where `engine.device` says, unless `device` does, with `engine.threads` threads on a CPU. SIGINT and
    SIGTERM end it after the batch or cell at hand, with StoppedError. Raises EngineError where there is no such device.
    """
    job = placed(job)
    failed: list[FailedCell] = []
    with _threads(job.config.engine), StopFlag() as stop:
        session = Session(job, device=device or device_here(job.config.engine))
        progress.replicas(1)
        for shard_work in work:
            failed += _run_shard(session, job, shard_work, progress, stop.check)
    for cell in failed:
        progress.failed(cell)
    return failed


def calibrate_local(job: Job, shard: Shard, *, device: str | None = None) -> dict[str, Any]:
    """Choose precisions on a sample, in this process, where `run_local` would compute."""
    from xaibatch.pipeline.calibrate import calibrate

    with _threads(job.config.engine):
        return calibrate(Session(job, device=device or device_here(job.config.engine)), shard)


@contextmanager
def _threads(engine: EngineConfig) -> Iterator[None]:
    """PyTorch's CPU threads as configured, for the time of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(engine.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_shard(
    session: Session, job: Job, work: ShardWork, progress: Progress, check: Callable[[], None]
) -> list[FailedCell]:
    """`check` raises StoppedError when it is time to end: asked before each cell and each batch inside it."""
    shard = work.shard
    clock = Stopwatch(lambda: session.num_forward_passes)
    check()
    try:
        with clock.measure("read"):
            session.hold(shard)
        with clock.measure("model"), session.interrupted_by(check):
            explained = session.explain(shard)
        if work.explain:
            with clock.measure("write"):
                write_explanations(job, shard, explained)
    except StoppedError:
        raise
    except Exception as error:
        return [
            FailedCell(shard=shard.name, stage=stage, error=f"{type(error).__name__}: {error}") for stage in work.stages
        ]
    if work.explain:
        progress.done(clock.report(shard, EXPLAIN, explained))
    failed = []
    for group in work.groups:
        check()
        clock = Stopwatch(lambda: session.num_forward_passes)
        try:
            run_group(session, job, shard, group, explained, clock, check)
        except StoppedError:
            raise
        except Exception as error:
            failed.append(FailedCell(shard=shard.name, stage=group.name, error=f"{type(error).__name__}: {error}"))
        else:
            progress.done(clock.report(shard, group.name, explained))
    return failed


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
    """A session whose answers to an adapter metric are reckoned as the model's time."""

    def __init__(self, session: Session, clock: Stopwatch) -> None:
        self._session, self._clock = session, clock

    def forward(self, images_BCHW: NDArray[np.floating]) -> NDArray[np.floating]:
        with self._clock.measure("model"):
            return self._session.forward(images_BCHW)

    def explain_images(
        self, label: str, images_BCHW: NDArray[np.floating], targets_B: Sequence[int], keys: Sequence[DrawKey]
    ) -> list[NDArray[np.floating]]:
        with self._clock.measure("model"):
            return self._session.explain_images(label, images_BCHW, targets_B, keys)

"""The plain engine: one session in this process, shard after shard; also what each cell does, step by step.

`run_local` is what runs where Ray is not installed, and the measure that the Ray engine is compared with.
"""

from collections.abc import Sequence
from typing import Any

from xaibatch.pipeline.adapter import score_adapter
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import GroupPlan, Job, ShardExplanations
from xaibatch.pipeline.scoring import plan_group, score_group
from xaibatch.pipeline.session import Session
from xaibatch.pipeline.stopping import StopFlag
from xaibatch.pipeline.work import EXPLAIN, FailedCell, Progress, ShardWork, Stopwatch, pixels_for
from xaibatch.pipeline.writing import write_explanations, write_scores
from xaibatch.types import Shard


def run_local(job: Job, work: Sequence[ShardWork], progress: Progress, *, device: str = "cpu") -> list[FailedCell]:
    """Do the work in this process, one shard after another; returns the cells that failed (they raise nothing). SIGINT
    and SIGTERM end it after the shard at hand, with StoppedError."""
    session = Session(job, device=device)
    progress.replicas(1)
    failed: list[FailedCell] = []
    with StopFlag() as stop:
        for shard_work in work:
            stop.check()
            failed += _run_shard(session, job, shard_work, progress)
    for cell in failed:
        progress.failed(cell)
    return failed


def calibrate_local(job: Job, shard: Shard, *, device: str = "cpu") -> dict[str, Any]:
    """Choose precisions on a sample, in this process."""
    from xaibatch.pipeline.calibrate import calibrate

    return calibrate(Session(job, device=device), shard)


def _run_shard(session: Session, job: Job, work: ShardWork, progress: Progress) -> list[FailedCell]:
    shard = work.shard
    clock = Stopwatch(lambda: session.num_forward_passes)
    try:
        with clock.measure("read"):
            session.hold(shard)
        with clock.measure("model"):
            explained = session.explain(shard)
        if work.explain:
            with clock.measure("write"):
                write_explanations(job, shard, explained)
            progress.done(clock.report(shard, EXPLAIN, explained))
    except Exception as error:
        return [
            FailedCell(shard=shard.name, stage=stage, error=f"{type(error).__name__}: {error}") for stage in work.stages
        ]
    failed = []
    for group in work.groups:
        clock = Stopwatch(lambda: session.num_forward_passes)
        try:
            run_group(session, job, shard, group, explained, clock)
            progress.done(clock.report(shard, group.name, explained))
        except Exception as error:
            failed.append(FailedCell(shard=shard.name, stage=group.name, error=f"{type(error).__name__}: {error}"))
    return failed


def run_group(
    session: Session, job: Job, shard: Shard, group: MetricGroup, explained: ShardExplanations, clock: Stopwatch
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

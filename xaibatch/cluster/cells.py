"""One shard's work in, a graph of object references out: which steps run where, and what each waits for.

read_images ─ segment_images ─ explain (replica) ─┬─ write_cell
                                                  ├─ plan_cell ─ segment_variants ─ answer (replica) ─ score_cell
                                                  └─ adapter_cell (asks the replica)
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

import ray

from xaibatch.cluster import tasks
from xaibatch.cluster.connect import ONE_THREAD
from xaibatch.cluster.nodes import selector
from xaibatch.cluster.pool import Slot
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import GroupPlan, Job
from xaibatch.pipeline.work import needs_pixels
from xaibatch.types import Shard

LOST_WORKER_RETRIES: Final = 3
"""Times that Ray itself runs a CPU task again whose worker or node was lost."""

IMAGES_A_SEGMENTATION_TASK: Final = 4
"""Superpixels take about a second an image: enough tasks to keep several cores busy for one shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A job as tasks get it: a reference, and the nodes on which none may run."""

    job: Any
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """References to a shard's explanations, its images and what both cost, and the replica that holds the images."""

    value: Any
    batch: Any
    spent: tuple[Any, ...]
    slot: Slot


def _task(sent: Sent, name: str, num_returns: int) -> Any:
    """The task to be called with everything but the job."""
    return partial(_remote(name, num_returns, sent.avoid).remote, sent.job)


@lru_cache(maxsize=64)
def _remote(name: str, num_returns: int, avoid: frozenset[str]) -> Any:
    return ray.remote(getattr(tasks, name)).options(
        num_cpus=1,
        num_returns=num_returns,
        max_retries=LOST_WORKER_RETRIES,
        runtime_env={"env_vars": dict(ONE_THREAD)},
        label_selector=selector(avoid),
    )


def explain(sent: Sent, shard: Shard, slot: Slot) -> Explained:
    """Images, and superpixels where an explainer wants them, beside the model; then predictions and maps."""
    batch, failures, read = _task(sent, "read_images", 3)(shard)
    specs, num_pieces = _segmentation(slot, shard)
    pieces = [_task(sent, "segment_images", 2)(batch, specs, piece, num_pieces) for piece in range(num_pieces)]
    value, spent = slot.handle.explain.options(num_returns=2).remote(
        shard, batch, failures, *(segments for segments, _ in pieces)
    )
    return Explained(value=value, batch=batch, spent=(spent, read, *(spent for _, spent in pieces)), slot=slot)


def write(sent: Sent, shard: Shard, explained: Explained) -> Any:
    """The cell `explain`: a reference to its report."""
    return _task(sent, "write_cell", 1)(shard, explained.value, *explained.spent)


def score(job: Job, sent: Sent, shard: Shard, group: MetricGroup, explained: Explained, count: bool) -> Any:
    """A metric group's cell: a reference to its report. `count`: reckon the explanations' cost to this cell."""
    before = explained.spent if count else ()
    batch = explained.batch if needs_pixels(job, group) else None
    if group.kind == "adapter":
        return _task(sent, "adapter_cell", 1)(
            shard, group, explained.value, explained.batch, explained.slot.handle, *before
        )
    if group.kind == "map":
        return _task(sent, "score_cell", 1)(shard, group, explained.value, batch, GroupPlan(questions=()), (), *before)
    plan, planned = _task(sent, "plan_cell", 2)(group, explained.value, batch)
    specs, num_pieces = _segmentation(explained.slot, shard) if group.kind == "variant" else ((), 0)
    pieces = [
        _task(sent, "segment_variants", 2)(explained.batch, plan, specs, piece, num_pieces)
        for piece in range(num_pieces)
    ]
    answers, answered = explained.slot.handle.answer.options(num_returns=2).remote(
        shard, plan, group.metrics[0], *(segments for segments, _ in pieces)
    )
    spent = (planned, answered, *(spent for _, spent in pieces), *before)
    return _task(sent, "score_cell", 1)(shard, group, explained.value, batch, plan, answers, *spent)


def _segmentation(slot: Slot, shard: Shard) -> tuple[tuple[str, ...], int]:
    """Which superpixels the explainers want, and how many tasks make a shard's."""
    assert slot.facts is not None
    specs = slot.facts.segmentations
    return specs, -(-len(shard.records) // IMAGES_A_SEGMENTATION_TASK) if specs else 0

"""What runs beside the replicas on CPUs: images, superpixels, plans, scores and the writing of parts; no torch.

Each function is a Ray task's body; its inputs are the outputs of earlier steps, handed over by reference, so no task
waits for another. Only `adapter_cell` asks a replica while it runs.

Shape letters: B images, C channels, H W pixels, h w a map's own sides, K classes.
"""

import socket
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from xaibatch.cluster.losses import is_loss
from xaibatch.cluster.replica import Segments, Spent
from xaibatch.data.storage import StoreError, is_away
from xaibatch.perturb.segmentation import segment
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import Answer, GroupPlan, Job, ShardExplanations
from xaibatch.pipeline.scoring import plan_group, score_group
from xaibatch.pipeline.variant_image import about, changed_image
from xaibatch.pipeline.work import EXPLAIN, CellReport, Stopwatch
from xaibatch.pipeline.writing import write_explanations, write_scores
from xaibatch.seeding import DrawKey
from xaibatch.types import Failure, ImageBatch, Shard

ItemT = TypeVar("ItemT")


def read_images(job: Job, shard: Shard) -> tuple[ImageBatch, tuple[Failure, ...], Spent]:
    """A shard's readable images, what became of the others, and the time it took."""
    _check_paths(job)
    clock = Stopwatch()
    with clock.measure("read"):
        batch, failures = job.read(shard)
    return batch, failures, Spent(seconds=clock.seconds)


def segment_images(
    job: Job, batch: ImageBatch, specs: tuple[str, ...], piece: int, num_pieces: int
) -> tuple[Segments, Spent]:
    """The superpixels of one of several consecutive pieces of a shard's readable images."""
    clock = Stopwatch()
    with clock.measure("segmentation"):
        images = _piece(tuple(batch.images_BCHW), piece, num_pieces)
        segments = {spec: [segment(image, spec, patch_size=job.tokens.patch) for image in images] for spec in specs}
    return segments, Spent(seconds=clock.seconds)


def segment_variants(
    job: Job, batch: ImageBatch, plan: GroupPlan, specs: tuple[str, ...], piece: int, num_pieces: int
) -> tuple[Segments, Spent]:
    """The superpixels of the images that one of several consecutive pieces of a plan's variants asks about."""
    clock = Stopwatch()
    segments: dict[str, list[NDArray[np.int32]]] = {spec: [] for spec in specs}
    with clock.measure("segmentation"):
        known: dict[object, list[NDArray[np.int32]]] = {}
        for question in _piece(plan.questions, piece, num_pieces):
            image = about(question)
            if image not in known:
                changed_CHW = changed_image(batch, question)
                image_CHW = batch.images_BCHW[question.row] if changed_CHW is None else changed_CHW
                known[image] = [segment(image_CHW, spec, patch_size=job.tokens.patch) for spec in specs]
            for spec, segments_HW in zip(specs, known[image], strict=True):
                segments[spec].append(segments_HW)
    return segments, Spent(seconds=clock.seconds)


def _piece(items: Sequence[ItemT], piece: int, num_pieces: int) -> Sequence[ItemT]:
    start, stop = (len(items) * edge // num_pieces for edge in (piece, piece + 1))
    return items[start:stop]


def write_cell(job: Job, shard: Shard, explained: ShardExplanations, *spent: Spent) -> CellReport:
    """Write the parts of the stage `explain`."""
    _check_paths(job)
    clock = Stopwatch()
    with clock.measure("write"):
        write_explanations(job, shard, explained)
    return _report(shard, EXPLAIN, explained, clock, spent)


def plan_cell(
    job: Job, group: MetricGroup, explained: ShardExplanations, batch: ImageBatch | None
) -> tuple[GroupPlan, Spent]:
    """A metric group's questions about a shard; `batch` where its metrics look at pixels, masks or twins."""
    clock = Stopwatch()
    with clock.measure("plan"):
        plan = plan_group(job, group, explained, batch)
    return plan, Spent(seconds=clock.seconds)


def score_cell(
    job: Job,
    shard: Shard,
    group: MetricGroup,
    explained: ShardExplanations,
    batch: ImageBatch | None,
    plan: GroupPlan,
    answers: tuple[Answer, ...],
    *spent: Spent,
) -> CellReport:
    """Score a metric group's answers and write its part."""
    _check_paths(job)
    clock = Stopwatch()
    with clock.measure("score"):
        scores = score_group(job, group, explained, plan, answers, batch)
    with clock.measure("write"):
        write_scores(job, group, shard, explained, scores)
    return _report(shard, group.name, explained, clock, spent)


def adapter_cell(
    job: Job,
    shard: Shard,
    group: MetricGroup,
    explained: ShardExplanations,
    batch: ImageBatch,
    replica: Any,
    *spent: Spent,
) -> CellReport:
    """Score one explainer with one adapter metric, whose model calls the replica answers, and write its part."""
    from xaibatch.pipeline.adapter import score_adapter  # the metric's own package is heavy

    _check_paths(job)
    clock, remote = Stopwatch(), _Remote(replica)
    with clock.measure("score"):
        scores = score_adapter(job, group, explained, batch, remote)
    if remote.loss is not None:
        raise remote.loss
    clock.seconds["score"] -= remote.waited_s
    with clock.measure("write"):
        write_scores(job, group, shard, explained, scores)
    return _report(shard, group.name, explained, clock, (*spent, *remote.spent))


class _Remote:
    """Stands in for a session: asks a replica and waits. Seconds of waiting give the task's CPU back.

    The metric's own package turns any error into rows; the `loss` of the replica is none of the images' errors.
    """

    def __init__(self, replica: Any) -> None:
        self._replica = replica
        self.spent: list[Spent] = []
        self.waited_s = 0.0
        self.loss: Exception | None = None

    def forward(self, images_BCHW: NDArray[np.floating]) -> NDArray[np.floating]:
        logits_BK: NDArray[np.floating] = self._answer(self._replica.forward.remote(images_BCHW))
        return logits_BK

    def explain_images(
        self, label: str, images_BCHW: NDArray[np.floating], targets_B: Sequence[int], keys: Sequence[DrawKey]
    ) -> list[NDArray[np.floating]]:
        maps: list[NDArray[np.floating]] = self._answer(
            self._replica.explain_images.remote(label, images_BCHW, targets_B, keys)
        )
        return maps

    def _answer(self, ref: Any) -> Any:
        if self.loss is not None:
            raise self.loss
        start = time.perf_counter()
        try:
            value, spent = ray.get(ref)
        except Exception as error:
            if is_loss(error):
                self.loss = error
            raise
        finally:
            self.waited_s += time.perf_counter() - start
        self.spent.append(spent)
        return value


def _check_paths(job: Job) -> None:
    """Raises StoreError where this machine does not see the run's files: what it read would count as missing, and what
    it wrote would be lost."""
    if path := next(filter(is_away, job.paths), None):
        raise StoreError(f"{path!r} is missing or empty on {socket.gethostname()}")


def _report(
    shard: Shard, stage: str, explained: ShardExplanations, clock: Stopwatch, spent: Sequence[Spent]
) -> CellReport:
    """The cell's own seconds and those of the steps before it."""
    for step in spent:
        clock.add(step.seconds, step.num_forward_passes)
    return clock.report(shard, stage, explained)

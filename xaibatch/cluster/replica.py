"""A model on one device as a Ray actor: shards and questions in, explanations and answers out.

Nothing here but the pinning, the threads and the reckoning; the work is `xaibatch.pipeline.session.Session`. This
module needs no torch until a replica works, so that the driver and CPU tasks may import it.

Shape letters: B images, C channels, H W pixels, h w a map's own sides, K classes.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from xaibatch.cluster.telemetry import ReplicaMeter
from xaibatch.errors import EngineError
from xaibatch.pipeline.host_memory import keep_freed_memory
from xaibatch.pipeline.job import Answer, GroupPlan, Job, ShardExplanations
from xaibatch.seeding import DrawKey
from xaibatch.types import Failure, ImageBatch, Shard

if TYPE_CHECKING:
    from xaibatch.pipeline.session import Session

Segments = Mapping[str, Sequence[NDArray[np.int32]]]
"""Superpixels by segmentation name, one int (H,W) per image or question."""

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What one step cost: seconds by kind, and images through the model."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    num_forward_passes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaFacts:
    """Where a replica runs; `gpu_ids` as Ray assigned them, `visible` as the process sees CUDA_VISIBLE_DEVICES;
    `segmentations`: the superpixels that its explainers want made beside the model."""

    node_id: str
    pid: int
    device: str
    gpu_ids: tuple[str, ...]
    visible: str | None
    segmentations: tuple[str, ...]


class Replica:
    """The actor. The model is loaded on the first call, so that a failure to load is an error of a call, with its
    cause, and a restarted actor loads again by itself."""

    def __init__(self, job: Job, *, device: str, threads: int) -> None:
        self._job = job
        self._device = device
        self._threads = threads
        self._loaded: Session | None = None
        self._meter = ReplicaMeter(job.run, f"{ray.get_runtime_context().get_node_id()[:8]}-{os.getpid()}")
        threading.Thread(target=self._meter.beat_for_ever, daemon=True).start()

    @property
    def session(self) -> "Session":
        if self._loaded is None:
            self._loaded = self._guarded(self._load)
        return self._loaded

    def _load(self) -> "Session":
        """The model on the device: never on another one than was asked for."""
        import torch

        from xaibatch.pipeline.session import Session

        keep_freed_memory()
        torch.set_num_threads(self._threads)
        if self._device == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                f"Ray counts a GPU on {socket.gethostname()} but PyTorch finds no CUDA device there: mend the driver, "
                "install PyTorch with CUDA, or compute on CPUs with --set engine.device=cpu"
            )
        return Session(self._job, device=self._device)

    def process(self) -> None:
        """Answered as soon as the process is there, before a model is loaded."""

    def facts(self, process: None = None) -> ReplicaFacts:
        """Load the model and say where it is. Given `process`, Ray runs that call first: calls may overtake each
        other."""
        device, segmentations = self.load()
        return ReplicaFacts(
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            device=device,
            gpu_ids=tuple(map(str, ray.get_gpu_ids())),
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
            segmentations=segmentations,
        )

    def load(self) -> tuple[str, tuple[str, ...]]:
        """The device, and the superpixels that the explainers want."""
        specs = {explainer.segmentation for explainer in self.session.explainers.values()}
        return str(self.session.device), tuple(sorted(spec for spec in specs if spec is not None))

    def explain(
        self, shard: Shard, batch: ImageBatch, failures: tuple[Failure, ...], *segments: Segments
    ) -> tuple[ShardExplanations, Spent]:
        """Predict and explain a shard, whose images were read beside the model; `segments` in consecutive pieces of
        them. Should they be lost with the process, a later call reads them again."""

        def work() -> ShardExplanations:
            self.session.keep(shard, batch, failures)
            return self.session.explain(shard, joined(segments))

        return self._spend(work)

    def answer(
        self, shard: Shard, plan: GroupPlan, label: str, *segments: Segments
    ) -> tuple[tuple[Answer, ...], Spent]:
        """Answer a metric group's questions in the precision chosen for `label`; `segments` of variants in consecutive
        pieces of the questions."""
        return self._spend(lambda: self.session.answer(shard, plan, label, joined(segments)))

    def forward(self, images_BCHW: NDArray[np.floating]) -> tuple[NDArray[np.floating], Spent]:
        """Logits (B,K), for adapter metrics."""
        return self._spend(lambda: self.session.forward(images_BCHW))

    def explain_images(
        self, label: str, images_BCHW: NDArray[np.floating], targets_B: Sequence[int], keys: Sequence[DrawKey]
    ) -> tuple[list[NDArray[np.floating]], Spent]:
        """One explainer's native maps (h,w), for adapter metrics."""
        return self._spend(lambda: self.session.explain_images(label, images_BCHW, targets_B, keys))

    def calibrate(self, shard: Shard) -> dict[str, Any]:
        """Compare precisions on a sample: see `xaibatch.pipeline.calibrate`."""
        from xaibatch.pipeline.calibrate import calibrate

        return self._guarded(lambda: calibrate(self.session, shard))

    def _spend(self, work: Callable[[], ValueT]) -> tuple[ValueT, Spent]:
        before, start = self.session.num_forward_passes, time.perf_counter()
        with self._meter.busy():
            value = self._guarded(work)
        seconds, num_passes = time.perf_counter() - start, self.session.num_forward_passes - before
        self._meter.count(len(value.ids) if isinstance(value, ShardExplanations) else 0, num_passes)
        return value, Spent(seconds={"model": seconds}, num_forward_passes=num_passes)

    def _guarded(self, work: Callable[[], ValueT]) -> ValueT:
        """A device in an error state stays so until its process ends: end it, Ray starts another and the call is tried
        again (out of memory is the session's own business and never comes here as long as one image fits)."""
        try:
            return work()
        except Exception as error:
            from xaibatch.pipeline.device import is_device_lost

            if is_device_lost(error):
                os._exit(1)
            raise


def joined(pieces: Sequence[Segments]) -> Segments:
    """Consecutive pieces as one."""
    names = sorted({name for piece in pieces for name in piece})
    return {name: [segments_HW for piece in pieces for segments_HW in piece.get(name, ())] for name in names}

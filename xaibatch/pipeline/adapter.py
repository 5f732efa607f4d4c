"""Adapter metrics of one shard: explanations, images and something that answers for the model in, rows out.

The answering side is a `Session` or a stand-in for a replica with the same two methods.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xaibatch.maps import pixel_map
from xaibatch.metrics.quantus_adapter import Outcome, QuantusMetric, score_with_quantus
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import Job, ShardExplanations
from xaibatch.seeding import DrawKey
from xaibatch.types import ERROR, MISSING_LABEL, ImageBatch, Score


class Answering(Protocol):
    """What a replica answers: logits of given images, and native maps of given images, classes and keys."""

    def forward(self, images_BCHW: NDArray[np.floating]) -> NDArray[np.floating]: ...

    def explain_images(
        self, label: str, images_BCHW: NDArray[np.floating], targets_B: Sequence[int], keys: Sequence[DrawKey]
    ) -> list[NDArray[np.floating]]: ...


def score_adapter(
    job: Job,
    group: MetricGroup,
    explained: ShardExplanations,
    batch: ImageBatch,
    session: Answering,
) -> tuple[Score, ...]:
    """Score one explainer's maps of a shard with one adapter metric.

    Metrics that need weights or hidden layers load the model in this process, on the CPU, and explain it here too;
    ChangedWeightsError where its checkpoint is no longer the one that the run began with.
    """
    (label,), explainer = group.metrics, group.explainer
    metric = job.metrics[label]
    assert isinstance(metric, QuantusMetric)
    assert explainer is not None
    size = (explained.shape_CHW[1], explained.shape_CHW[2])
    changed = _ChangedModels(job)
    scores = []
    for repeat in range(job.config.repeats):
        map_repeat = job.map_repeat(explainer, repeat)
        maps = explained.maps[explainer, map_repeat]
        classes_B = _classes(metric, explained, maps.targets_B)
        outcomes: list[Outcome | None] = [
            _refused(explained, (explainer, map_repeat, image_id), int(k))
            for image_id, k in zip(explained.ids, classes_B, strict=True)
        ]
        rows = [row for row, outcome in enumerate(outcomes) if outcome is None]

        def explain(images: Any, targets: Any, keys: Any, model: Any) -> NDArray[np.floating]:
            answering = session if model is None else changed.session(model)
            native = answering.explain_images(explainer, images, [int(k) for k in targets], keys)
            return np.stack([pixel_map(map_hw, size, job.map_options) for map_hw in native])

        if rows:
            scored = score_with_quantus(
                metric,
                x_BCHW=batch.images_BCHW[rows],
                y_B=classes_B[rows],
                maps_BHW=np.stack([pixel_map(maps.maps_Bhw[row], size, job.map_options) for row in rows]),
                keys=[job.key(explained.ids[row], repeat) for row in rows],
                predict=session.forward,
                explain=explain,
                load_model=changed.original,
                masks={name: mask_BHW[rows] for name, mask_BHW in batch.masks.items()},
                num_classes=explained.logits_BK.shape[1],
            )
            for row, done in zip(rows, scored, strict=True):
                outcomes[row] = done
        for image_id, outcome in zip(explained.ids, outcomes, strict=True):
            value, status, reason = outcome or Outcome(None, ERROR, "not scored")
            scores.append(
                Score(
                    image_id=image_id, explainer=explainer, metric=label, repeat=repeat,
                    value=value, status=status, reason=reason,
                )
            )  # fmt: skip
    return tuple(scores)


class _ChangedModels:
    """The configured model, and sessions that explain copies of it with other weights."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model: Any = None
        self._session: Answering | None = None

    def original(self) -> Any:
        """The configured model, loaded in this process."""
        from xaibatch.pipeline.facts import model_of

        return model_of(self._job)

    def session(self, model: Any) -> Answering:
        """What explains this model. Quantus changes one object's weights again and again: its session is kept."""
        if self._session is None or model is not self._model:
            from xaibatch.pipeline.session import Session

            self._model, self._session = model, Session(self._job, model=model)
        return self._session


def _classes(metric: QuantusMetric, explained: ShardExplanations, targets_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """Quantus's one class per image: the explained one where it explains changed images, else the scored one."""
    if metric.facts.needs_explanations:
        return np.asarray(targets_B, np.int64)
    if metric.options.scored_class == "predicted":
        return np.asarray(explained.logits_BK.argmax(1), np.int64)
    return np.asarray(explained.labels_B, np.int64)


def _refused(explained: ShardExplanations, about: tuple[str, int, str], scored_class: int) -> Outcome | None:
    if about in explained.missing:
        return Outcome(None, ERROR, explained.missing[about])
    if scored_class < 0:
        return Outcome(None, MISSING_LABEL, "the metric reads the true label's output and the image has no label")
    return None

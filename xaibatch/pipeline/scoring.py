"""Plans and scores of a metric group for one shard: from maps and answers to rows; NumPy only, no torch, no model.

Shape letters: B images, C channels, H W pixels, h w a map's own sides, K classes, S samples of a plan.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xaibatch.errors import NotScoredError
from xaibatch.maps import pixel_map
from xaibatch.metrics.base import ImageView, MapMetric, MapView, Metric, PlanMetric, VariantMetric, VariantView
from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import Answer, GroupPlan, Job, Question, Refusal, ShardExplanations
from xaibatch.types import ALL_ZERO_MAP, ERROR, NAN_MAP, OK, ImageBatch, Score


def plan_group(
    job: Job, group: MetricGroup, explained: ShardExplanations, batch: ImageBatch | None = None
) -> GroupPlan:
    """Ask each image's questions once: for all explainers where the metric ignores the map, else per explainer.

    `batch` (pixels, masks, twins) is needed only where a metric of the group says so.
    """
    metric = job.metrics[group.metrics[0]]
    questions: list[Question] = []
    refusals: list[Refusal] = []
    for row, repeat in _rows(job, explained):
        for explainer in job.config.explainers if _per_map(metric) else (None,):
            view: ImageView = (
                _image_view(job, explained, batch, row, repeat, metric)
                if explainer is None
                else _map_view(job, explained, batch, row, repeat, explainer, metric)
            )
            try:
                if isinstance(view, MapView):
                    _check_map(explained, view, job.map_repeat(view.explainer, repeat))
                asks = metric.variants(view) if isinstance(metric, VariantMetric) else (_plan(metric, view),)
            except NotScoredError as refused:
                refusals.append(
                    Refusal(row=row, repeat=repeat, explainer=explainer, status=refused.status, reason=refused.reason)
                )
                continue
            questions += [Question(row=row, repeat=repeat, explainer=explainer, ask=ask) for ask in asks]
    return GroupPlan(questions=tuple(questions), refusals=tuple(refusals))


def score_group(
    job: Job,
    group: MetricGroup,
    explained: ShardExplanations,
    plan: GroupPlan,
    answers: Sequence[Answer],
    batch: ImageBatch | None = None,
) -> tuple[Score, ...]:
    """One score for every image, explainer, metric of the group and repeat; undefined ones are null with a reason."""
    asked: defaultdict[tuple[int, int, str | None], list[tuple[Question, Answer]]] = defaultdict(list)
    for question, answer in zip(plan.questions, answers, strict=True):
        asked[question.row, question.repeat, question.explainer].append((question, answer))
    refused = {(r.row, r.repeat, r.explainer): r for r in plan.refusals}
    scores = []
    for row, repeat in _rows(job, explained):
        for explainer in job.config.explainers:
            for label in group.metrics:
                metric = job.metrics[label]
                about = (row, repeat, explainer if _per_map(metric) else None)
                value, status, reason = None, OK, ""
                try:
                    view = _map_view(job, explained, batch, row, repeat, explainer, metric)
                    _check_map(explained, view, job.map_repeat(explainer, repeat))
                    if about in refused:
                        raise NotScoredError(refused[about].status, refused[about].reason)
                    value = _finite(_score(metric, view, asked[about]))
                except NotScoredError as undefined:
                    status, reason = undefined.status, undefined.reason
                except Exception as error:
                    status, reason = ERROR, f"{type(error).__name__}: {error}"
                scores.append(
                    Score(
                        image_id=explained.ids[row], explainer=explainer, metric=label, repeat=repeat,
                        value=value, status=status, reason=reason,
                    )
                )  # fmt: skip
    return tuple(scores)


def map_status(map_hw: np.ndarray) -> str:
    """`ok`, `nan_map` or `all_zero_map`: flagged, never altered."""
    if not np.isfinite(map_hw).all():
        return NAN_MAP
    return OK if map_hw.any() else ALL_ZERO_MAP


def _rows(job: Job, explained: ShardExplanations) -> Iterator[tuple[int, int]]:
    for row in range(len(explained.ids)):
        for repeat in range(job.config.repeats):
            yield row, repeat


def _per_map(metric: Metric) -> bool:
    return isinstance(metric, PlanMetric) and metric.plan_uses_map


def _plan(metric: Metric, view: ImageView) -> Any:
    assert isinstance(metric, PlanMetric)
    return metric.plan(view)


def _score(metric: Metric, view: MapView, asked: Sequence[tuple[Question, Answer]]) -> float:
    if isinstance(metric, MapMetric):
        return metric.score(view)
    if isinstance(metric, PlanMetric):
        ((question, answer),) = asked
        return metric.score(view, question.ask, np.asarray(answer.logits, np.float64))  # type: ignore[arg-type]
    assert isinstance(metric, VariantMetric)
    return metric.score(view, tuple(_variant_view(view, answer) for _, answer in asked))


def _variant_view(view: MapView, answer: Answer) -> VariantView:
    map_hw = answer.maps[view.explainer]
    if map_hw is None:
        raise NotScoredError(ERROR, "the explainer failed on a changed copy of the image")
    return VariantView(
        map_hw=map_hw,
        pixels_HW=pixel_map(map_hw, view.shape_CHW[1:], view.map_options),
        logits_K=np.asarray(answer.logits, np.float64),
        target=answer.target,
    )


def _finite(value: float) -> float:
    if not np.isfinite(value):
        raise NotScoredError(ERROR, f"the score is {value}")
    return float(value)


def _check_map(explained: ShardExplanations, view: MapView, map_repeat: int) -> None:
    reason = explained.missing.get((view.explainer, map_repeat, view.key.image_id))
    if reason is not None:
        raise NotScoredError(ERROR, reason)
    status = map_status(view.map_hw)
    if status != OK:
        raise NotScoredError(
            status, "the map has NaN or infinite values" if status == NAN_MAP else "the map is all zero"
        )


def _known(
    job: Job, explained: ShardExplanations, batch: ImageBatch | None, row: int, repeat: int, metric: Metric
) -> dict[str, Any]:
    """The fields of an ImageView."""
    needs_pixels, needs_mask, needs_twin = ("image" in metric.needs, "mask" in metric.needs, "twin" in metric.needs)
    if needs_pixels or needs_mask or needs_twin:
        assert batch is not None and batch.ids == explained.ids, "the group's metrics need the shard's pixels"
    masks = {}
    if batch is not None and needs_mask:
        masks = {name: mask_BHW[row] for name, mask_BHW in batch.masks.items() if batch.has_mask[name][row]}
    twin = batch.twins_BCHW[row] if batch is not None and needs_twin and batch.twins_BCHW is not None else None
    return {
        "key": job.key(explained.ids[row], repeat),
        "shape_CHW": explained.shape_CHW,
        "label": int(explained.labels_B[row]),
        "predicted": int(explained.logits_BK[row].argmax()),
        "logits_K": explained.logits_BK[row],
        "image_CHW": batch.images_BCHW[row] if batch is not None and (needs_pixels or needs_twin) else None,
        "twin_CHW": twin if twin is not None and np.isfinite(twin).all() else None,
        "masks": masks,
        "patch_size": job.patch_size,
        "grid": job.tokens,
    }


def _image_view(
    job: Job, explained: ShardExplanations, batch: ImageBatch | None, row: int, repeat: int, metric: Metric
) -> ImageView:
    targets = {int(maps.targets_B[row]) for maps in explained.maps.values()}
    target = targets.pop() if len(targets) == 1 else -1
    return ImageView(**_known(job, explained, batch, row, repeat, metric), target=target)


def _map_view(
    job: Job,
    explained: ShardExplanations,
    batch: ImageBatch | None,
    row: int,
    repeat: int,
    explainer: str,
    metric: Metric,
) -> MapView:
    maps = explained.maps[explainer, job.map_repeat(explainer, repeat)]
    return MapView(
        **_known(job, explained, batch, row, repeat, metric),
        explainer=explainer,
        target=int(maps.targets_B[row]),
        map_hw=maps.maps_Bhw[row],
        map_options=job.map_options,
    )

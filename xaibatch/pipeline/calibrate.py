"""Which precision each explainer and metric may use: scores of a sample in float32 and in bfloat16 in, a choice out.

DESIGN rule 5. The tolerance applies to the change of a metric's mean score over the sample, per explainer. Only forward
passes on perturbed copies change precision; traces and relevance passes, maps and scores never do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from xaibatch.pipeline.cells import MetricGroup
from xaibatch.pipeline.job import GroupPlan, Job, ShardExplanations
from xaibatch.pipeline.scoring import plan_group, score_group
from xaibatch.pipeline.session import Session
from xaibatch.pipeline.work import pixels_for
from xaibatch.types import Score, Shard

MIN_IMAGES: Final = 2
"""Images that must be scored in both precisions before bfloat16 is chosen: the smallest sample that is allowed."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One label's precision and why; metrics that share a plan share its precision, and so the choice.

    worst_error: largest |mean score in bfloat16 - mean score in float32| over what the label touches, in the score's
    unit; worst_pair: the (explainer, metric) of it.
    num_pairs: scores that have a value in both precisions; num_images: images of the sample that these are of, fewer
    than MIN_IMAGES of which decide for float32.
    num_flips: maps of the sample whose set of non-zero pixels changed, of num_maps (only for explainers: a top-k mask
    that flips is counted, not averaged away).
    """

    label: str
    precision: str
    worst_error: float
    worst_pair: tuple[str, str]
    num_pairs: int
    num_images: int
    num_flips: int = 0
    num_maps: int = 0


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones: AVX512-BF16, AMX, or a GPU since Ampere."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def calibrate(session: Session, shard: Shard) -> dict[str, Any]:
    """Return the record of the choice: `chosen` label -> precision, and each choice's measured error on the sample.

    `session` computes in float32; `shard` holds the sample. Labels that bfloat16 does not touch stay float32, and so
    do all where the device is not faster in bfloat16.
    """
    job = session.job
    if not has_fast_bfloat16(session.device):
        return {"why": f"{session.device} is not faster in bfloat16"}
    tolerance = job.config.precision.tolerance
    explained = session.explain(shard)
    reference = {group.name: _scored(session, shard, group, explained, {}) for group in _groups(job)}
    choices = []
    for group in _groups(job):
        if group.kind == "plan":
            scores = _scored(session, shard, group, explained, dict.fromkeys(group.metrics, "bfloat16"))
            choice = _choose(group.metrics[0], reference[group.name], scores, tolerance)
            choices += [replace(choice, label=label) for label in group.metrics]
    for label in _asking_labels(session):
        with _precisions(session, {label: "bfloat16"}):
            passes_before = session.runner(label).num_forward_passes
            coarse = session.explain(shard)
            if session.runner(label).num_forward_passes == passes_before:
                continue  # it calls the model itself, in float32
            scores = tuple(
                score for group in _groups(job) for score in _scored(session, shard, group, coarse, {label: "bfloat16"})
            )
        before = [score for group in _groups(job) for score in reference[group.name]]
        choice = _choose(label, _of(before, label), _of(scores, label), tolerance)
        flips, maps = _flips(explained, coarse, label)
        choices.append(replace(choice, num_flips=flips, num_maps=maps))
    chosen = dict.fromkeys((*job.config.explainers, *job.config.metrics), "float32")
    chosen |= {choice.label: choice.precision for choice in choices}
    return {
        "asked": "auto",
        "chosen": chosen,
        "tolerance": tolerance,
        "device": str(session.device),
        "sample": list(explained.ids),
        "measured": [asdict(choice) for choice in choices],
    }


def _groups(job: Job) -> tuple[MetricGroup, ...]:
    return tuple(group for group in job.groups if group.kind != "adapter")


def _asking_labels(session: Session) -> list[str]:
    """Explainers whose model calls may be plans: those that neither trace the model nor differentiate it."""
    return [
        label
        for label, explainer in session.explainers.items()
        if explainer.needs == "any" and explainer.num_forward_passes() > 0
    ]


class _precisions:  # noqa: N801  a context manager, used like a function
    """Use other precisions for a while."""

    def __init__(self, session: Session, changes: Mapping[str, str]) -> None:
        self._session, self._changes = session, changes

    def __enter__(self) -> None:
        self._job = self._session.job
        self._session.job = replace(self._job, precisions={**self._job.precisions, **self._changes})

    def __exit__(self, *_: object) -> None:
        self._session.job = self._job


def _scored(
    session: Session, shard: Shard, group: MetricGroup, explained: ShardExplanations, changes: Mapping[str, str]
) -> tuple[Score, ...]:
    job = session.job
    batch = pixels_for(job, group, lambda: session.hold(shard).batch)
    plan = GroupPlan(questions=()) if group.kind == "map" else plan_group(job, group, explained, batch)
    with _precisions(session, changes):
        answers = session.answer(shard, plan, group.metrics[0])
    return score_group(job, group, explained, plan, answers, batch)


def _choose(label: str, before: Sequence[Score], after: Sequence[Score], tolerance: float) -> Choice:
    """bfloat16 if enough was compared, no (explainer, metric) mean moves by more than the tolerance and none becomes
    undefined."""
    worst, pair = 0.0, ("", "")
    for explainer, metric in sorted({(score.explainer, score.metric) for score in before}):
        a, b = (_mean(scores, explainer, metric) for scores in (before, after))
        if a is None and b is None:
            continue
        error = abs(a - b) if a is not None and b is not None else float("inf")
        if error > worst:
            worst, pair = error, (explainer, metric)
    compared = _scored_in(before) & _scored_in(after)
    num_images = len({image_id for image_id, *_ in compared})
    return Choice(
        label=label,
        precision="bfloat16" if worst <= tolerance and num_images >= MIN_IMAGES else "float32",
        worst_error=worst,
        worst_pair=pair,
        num_pairs=len(compared),
        num_images=num_images,
    )


def _scored_in(scores: Sequence[Score]) -> set[tuple[str, str, str, int]]:
    """What has a value."""
    return {(s.image_id, s.explainer, s.metric, s.repeat) for s in scores if s.value is not None}


def _of(scores: Sequence[Score], explainer: str) -> list[Score]:
    return [score for score in scores if score.explainer == explainer]


def _mean(scores: Sequence[Score], explainer: str, metric: str) -> float | None:
    values = [s.value for s in scores if s.explainer == explainer and s.metric == metric and s.value is not None]
    return float(np.mean(values)) if values else None


def _flips(a: ShardExplanations, b: ShardExplanations, label: str) -> tuple[int, int]:
    """Maps whose set of non-zero pixels differs, and how many maps there are."""
    pairs = [(a.maps[key].maps_Bhw, b.maps[key].maps_Bhw) for key in a.maps if key[0] == label]
    flips = sum(int(((x != 0) != (y != 0)).any((1, 2)).sum()) for x, y in pairs)
    return flips, sum(len(x) for x, _ in pairs)
